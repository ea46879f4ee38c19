"""README.md can not rot: the scripts know its commands, its tables are published, its tests exist. And every -h."""
import ast
import glob
import os
import re
import shlex
import shutil
import textwrap

import pytest

import configurator
import run_experiment
from configurator import SCRIPTS, configure, source
from test_train import HERE

README, MAKEFILE = source('README.md'), source('Makefile')
TESTS = ''.join(source(path) for path in glob.glob(f'{HERE}/test_*.py') if path != __file__)
STAGES = {'run_experiment.py': SCRIPTS[:-1], 'bench.py': SCRIPTS}
HELPFUL = (*SCRIPTS, 'report.py', 'export_hf.py', 'sample.py', 'bench.py')

def commands(text):
    """The lines of a text that a reader would type."""
    return re.findall(r'^    ((?:\.venv/bin/pip|python3?|make|torchrun) .*)', text, re.M)

def block(start, end):
    """Code of the README from the words `start` on, up to the words `end`."""
    return textwrap.dedent('    ' + start + README.split(start)[1].split(end)[0])

@pytest.mark.parametrize('script', HELPFUL)
def test_help(script, capsys):
    with pytest.raises(SystemExit):
        configure(script, ['-h'], stages=STAGES.get(script, ()))
    text = capsys.readouterr().out
    assert 'Reads ' in text and 'Writes ' in text and len(commands(text)) >= 2
    for key, setting in configurator.block(script).items():
        assert f'--{key}={setting.default!r} ' in text and setting.comment in text

def test_commands(tmp_path, monkeypatch):
    """Scripts know their flags, and tests run them; an experiment is planned; what needs the network says so."""
    shutil.copytree(f'{HERE}/config', tmp_path / 'config')
    os.symlink(f'{HERE}/results', tmp_path / 'results')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config/wide_mlp.py').write_text(block('# config/wide_mlp.py', 'python '))
    exec(block('import numpy as np, shards', '# then'), {})                    # writes data/mine
    docstrings = [ast.get_docstring(ast.parse(source(script))) for script in HELPFUL]
    for line in commands('\n'.join([README, *docstrings])):
        command, _, mark = line.partition('  #')
        words = shlex.split(command)
        script = next((word for word in words if word.endswith('.py')), None)
        if words[0] == 'make':
            assert f'\n{words[1]}:' in MAKEFILE, line
        elif script is None:
            assert 'network' in mark or ' '.join(words[1:]) in MAKEFILE, line
        else:
            args = words[words.index(script) + 1:]
            cfg = configure(script, args, script in ('plot.py', 'report.py'), STAGES.get(script, ()))
            assert re.search(f"'{script}'|import {script[:-3]}\\b|from {script[:-3]} ", TESTS), line
            if script == 'run_experiment.py':
                cfg.dry_run = True
                run_experiment.main(cfg)

def test_tables_and_names():
    """A number in a table of results stands in the file linked before it; the tests and files that are named exist."""
    assert len(README.encode()) <= 16 * 1024 and README.count('\n') <= 260
    checked, published = 0, ''
    for line in README.splitlines():
        if line.startswith('## '):
            published = ''                                  # a section without such a link has other tables
        for path in re.findall(r'\]\((results/[^\s)]+\.(?:md|json))\)', line):
            published = source(path)
        cells = re.findall(r'(?<=\| )[-+]?\d[-\d.e%± ]*(?= \|)', line) if published else []
        assert all(cell in published for cell in cells), line
        checked += len(cells)
    names = re.findall(r'`(test_\w+)`', README)
    assert checked > 30 and names and all(f'def {name}(' in TESTS for name in names)
    assert all(os.path.exists(f'{HERE}/{path}') for path in re.findall(r'\]\((?!http)([^\s)]+)', README))
