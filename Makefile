# make demo: the whole experiment in miniature.  make test: the tests.  Both make the environment first, in .venv
# make test-transformer-lens: the tests of the export with TransformerLens, in .venv-tl
PYTHON ?= python3

.PHONY: demo test test-transformer-lens clean
demo: .venv/done
	.venv/bin/python run_experiment.py config/demo.py

test: .venv/done
	.venv/bin/python -m pytest -q -rs -n 2 --dist loadfile

test-transformer-lens: .venv-tl/done
	REQUIRE_TRANSFORMER_LENS=1 .venv-tl/bin/python -m pytest -q -rs test_export.py

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv-tl/done: requirements.txt requirements-tl.txt
	$(PYTHON) -m venv .venv-tl
	.venv-tl/bin/pip install --quiet --disable-pip-version-check -r requirements-tl.txt
	touch $@

# the environments, and what the demo made; other data/ and out/ folders may have taken hours and are kept
clean:
	rm -rf .venv .venv-tl data/demo out/demo __pycache__ .pytest_cache
