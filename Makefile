# make demo: the whole experiment in miniature.  make test: the tests.  Both make the environment first, in .venv
PYTHON ?= python3

.PHONY: demo test clean
demo: .venv/done
	.venv/bin/python run_experiment.py config/demo.py

test: .venv/done
	.venv/bin/python -m pytest -q

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# the environment, and what the demo made; other data/ and out/ folders may have taken hours and are kept
clean:
	rm -rf .venv data/demo out/demo __pycache__ .pytest_cache
