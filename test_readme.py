"""Configs; and README.md can not rot: scripts know its commands, its tables are published, its tests exist."""
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

def test_files_before_flags_and_derived_values(tmp_path, monkeypatch):
    """A flag wins; what a file imports or defines to derive its values is no key; ~ is the home folder."""
    for path in glob.glob(f'{HERE}/config/*.py'):
        assert configure('run_experiment.py', [path], stages=SCRIPTS).overrides
    monkeypatch.setenv('HOME', str(tmp_path))
    path = tmp_path / 'c.py'
    path.write_text('import math\nfrom math import sqrt\nclass Size: tokens = 512\ndef half(x): return x // 2\n'
                    '_half = half(Size.tokens) // 2\nn_embd = 2 * _half\nconcentration = 7\nmax_iters = 5\n'
                    'recal_iters = 0.1\nout_dir = "~/out"  # naïve, in UTF-8', 'utf-8')
    cfg = configure('train.py', ['--max_iters=9', str(path), '--compile=false', '--n_kv_head=none', '--run=123'])
    assert (cfg.n_embd, cfg.max_iters, cfg.compile, cfg.n_kv_head, cfg.run) == (256, 9, False, None, '123')
    assert cfg.out_dir == f'{tmp_path}/out' and configure('train.py', ['--run=~/r']).run == f'{tmp_path}/r'
    assert configure('plot.py', ['~/x'], positional=True).paths == [f'{tmp_path}/x']
    assert configure('run_experiment.py', ['--arms=a,b', '--seeds=3']).arms == ('a', 'b')
    cfg = configure('drope.py', [str(path), '--recal_lr_scale=1'])
    assert cfg.recal_iters == (0.1,) and type(cfg.recal_lr_scale[0]) is float and not hasattr(cfg, 'n_embd')

def test_blocks():
    """No number is without a range. A key that two scripts have must mean the same in both: run_experiment.py resolves
    it once. The two makers of data may differ: each has its own where an experiment sets nothing."""
    seen, wiki = {}, configurator.block('prepare_wiki.py')
    for script in SCRIPTS:
        for key, default in configurator.block(script).items():
            if script != 'prepare_wiki.py':
                assert seen.setdefault(key, default)[:2] == default[:2], f'{key} in {script}'
            assert wiki.get(key, default)[1] == default[1]              # of one type even so
            assert bool(default.range) == (default.kind in (int, float)), f'{key} in {script}'
    cfg = configure('run_experiment.py', ['--data_script=prepare_wiki.py', '--vocab_size=999'], stages=SCRIPTS)
    at = run_experiment.data_stage(cfg, 3, 'mha_shuffled_pure')
    assert (at.n_topics, at.vocab_size, at.max_segments, at.seed) == (wiki['n_topics'][0], 999, 1, 0)
    assert at.data_dir == 'data/wiki_pure' and at.work_dir == 'data/wiki_work'

@pytest.mark.parametrize('setting, words', (
    ('max_iter = 5', "unknown key 'max_iter'; did you mean 'max_iters'"),
    ('max_iters = 5 +', 'c.py, line 1'),
    ('max_iters = nothing', "'nothing' is not defined"),
    ('weight_decay = -1', 'weight_decay = -1.0 is not in [0, inf)'),
    ('muon_lr = float("nan")', 'muon_lr = nan'),
    ('adam_lr = float("inf")', 'adam_lr = inf'),
    ('rope_theta = 0', 'rope_theta = 0.0 is not in (0, inf)'),
    ('cooldown = 1.01', 'cooldown = 1.01 is not in [0, 1]'),
    ('seeds = (0, 2 ** 63)', 'seeds = 9223372036854775808'),
    ('n_topics = 256', 'n_topics = 256 is not in [1, 255]'),
    ('probe_tokens = 99', 'probe_tokens = 99')))
def test_a_file_is_checked_whole(tmp_path, setting, words):
    (tmp_path / 'c.py').write_text(setting)
    for script in ('run_experiment.py', 'train.py'):        # whichever reads it
        with pytest.raises(SystemExit, match='c.py') as stop:
            configure(script, [f'{tmp_path}/c.py'])
        assert words in str(stop.value)

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
