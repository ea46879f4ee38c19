"""Kinds of faults that users of such programs report, each closed at one place; text: test_wiki.py."""
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import analyze
import configurator
import machine
import plot
import report
import runs
import shards
from configurator import configure
from test_smoke import EXPERIMENT
from test_train import (ENV, HERE, TINY, command, dataset, refuses, run,    # noqa: F401 (dataset is a fixture)
                        spawn, succeeds)

ONE_ARM = ("arms = ('mha_shuffled',)\n", "recal_iters = 2\n")

@pytest.fixture
def place(tmp_path):
    """An empty folder with the experiment of test_smoke.py, one arm of it, as tiny.py."""
    (tmp_path / 'tiny.py').write_text(EXPERIMENT + ''.join(ONE_ARM))
    return tmp_path

def experiment(place, *args):
    return run('run_experiment.py', 'tiny.py', *args, cwd=place)

# -----------------------------------------------------------------------------
# 1: two writers

def test_the_second_writer_is_refused(dataset, place):
    out = f'{place}/run'
    train = [*TINY, f'--data_dir={dataset}', '--max_iters=2', f'--run={out}']
    succeeds(run('train.py', *train))
    (place / 'seed0.tmp-1').mkdir()                         # the user's own, like a temporary of ours by its name
    with runs.locked(out), runs.locked(f'{place}/seed0'), runs.locked(f'{place}/out/tiny/mha_shuffled_rope/seed0/arm'):
        refuses(run('train.py', *train), out, 'at work')
        refuses(run('analyze.py', f'--run={out}'), out, 'at work')
        refuses(run('data_synth.py', f'{place}/tiny.py', f'--data_dir={place}'), f'{place}/seed0', 'at work')
        refuses(experiment(place), 'mha_shuffled_rope/seed0/arm', 'at work')
    assert os.path.exists(f'{out}/ckpt.pt') and not os.path.exists(f'{out}/row.json')
    succeeds(run('data_synth.py', f'{place}/tiny.py', f'--data_dir={place}'))
    assert (place / 'seed0.tmp-1').is_dir()

def test_sigterm_ends_the_children_too(place):
    """A long training, other arms in the queue: after SIGTERM no process of the group is left."""
    args = ['tiny.py', '--arms=mha_topic_ordered,mha_shuffled,mha_pseudo', '--jobs=1', '--max_iters=100000']
    process = subprocess.Popen(command('run_experiment.py', *args), cwd=place, env=ENV, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    log = f'{place}/out/tiny/mha_topic_ordered_rope/seed0/log.jsonl'
    wait_for(lambda: os.path.exists(log) or process.poll() is not None)
    process.terminate()
    assert 'the same command goes on' in process.communicate(timeout=60)[1] and process.returncode == 1
    wait_for(lambda: not group_lives(process.pid))
    left = group_lives(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert not left

def wait_for(condition):
    end = time.time() + 60
    while not condition() and time.time() < end:
        time.sleep(0.1)

def group_lives(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True

# -----------------------------------------------------------------------------
# 3: sizes; 4: denominators; 5: ranges; 8: order of acts

def test_sizes_nobody_thought_of(place, monkeypatch, capfd):
    """Rows shorter than the least distance of P; more topics than the width of the states, and than colours. And
    numbers come before pictures: they are there where those can't be drawn."""
    odd = '--n_topics=11', '--vocab_size=44', '--block_size=12', '--min_segment_len=2', '--n_embd=6'
    with monkeypatch.context() as patch:
        patch.setattr(plot, 'main', Mock(side_effect=OSError(28, 'No space left on device')))
        refuses(experiment(place, *odd), 'No space left')
    assert '| mha_shuffled_rope ' in (place / 'out/tiny/summary.md').read_text()
    row = runs.read_row(f'{place}/out/tiny/mha_shuffled_rope/seed0')
    assert row['mean']['score_p'] is None and np.shape(row['curve']['topics'])[1] == 11
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.simplefilter('error', RuntimeWarning)
        succeeds(experiment(place, *odd))
    workers = capfd.readouterr()
    assert 'Warning' not in workers.err and 'P —' in workers.out

def test_what_is_undefined_is_null():
    same = {'uniform': 3.0, 'bigram': 2.0, 'filter': 2.0, 'oracle': 1.0}
    found = analyze.outcome(2.5, same)
    assert found['gap_closed'] is None and found['excess'] == 0.5
    assert runs.orderedness([{'topics': [5, 0]}, {'topics': [4, 0]}], 'topics') is None        # one topic
    assert runs.plain({'a': np.array([1.0, np.nan]), 'b': torch.tensor(np.nan)}) == {'a': [1.0, None], 'b': None}
    assert report.fieller({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}) == (None, None, None)

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

# -----------------------------------------------------------------------------
# 9: one line; 10: cost; 11: where am I

def test_output_stops_nothing(place, monkeypatch):
    """A reader that has left, a full disk, closed streams, ASCII alone: the report is written all the same."""
    for streams, unbuffered in (('2>&1 | head -c 1', ''), ('> /dev/full 2>&-', '1')):
        line = shlex.join(command('run_experiment.py', 'tiny.py', '--publish=True'))
        line = f'{line} {streams}; exit ${{PIPESTATUS[0]}}'
        shutil.rmtree(place / 'out', ignore_errors=True)
        done = succeeds(spawn(['bash', '-c', line], place, {'PYTHONUNBUFFERED': unbuffered}))  # to write, or to flush
        assert not done.stderr and (place / 'results/tiny/summary.md').exists(), done.stderr
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', ascii_only)
    monkeypatch.setattr(sys, 'stderr', sys.stderr)
    configurator.be_patient()
    print('—')
    assert ascii_only.buffer.getvalue() == b'' and sys.stdout.flush() is None and ascii_only.buffer.getvalue() == b'?\n'

def test_the_environment_is_told_in_one_line(dataset, tmp_path):
    good = [*TINY, f'--data_dir={dataset}', '--max_iters=2', f'--run={tmp_path}/run']
    alone = spawn(command('train.py', *good), env={'RANK': '0', 'WORLD_SIZE': '1'})
    refuses(alone, 'RANK', 'MASTER_ADDR', 'torchrun')
    (tmp_path / 'windows.py').write_bytes(b'\xef\xbb\xbfmax_iters = 2\r\neval_rows = 3\r\n')
    succeeds(run('train.py', f'{tmp_path}/windows.py', *good))
    succeeds(spawn(command('plot.py', tmp_path), env={'MPLBACKEND': 'module://nowhere'}))      # not analysed yet
    assert set(os.listdir(tmp_path / 'figures')) == {'loss.png', 'order.png'}
    assert report.value(runs.row_of_log(f'{tmp_path}/run'), 'val_loss') > 0

def test_cores_that_may_be_used():
    one_core = ['taskset', '-c', '0', sys.executable, '-c', 'import machine as m; print(m.threads(), m.threads(9))']
    assert spawn(one_core, HERE).stdout == '1 1\n'
    assert machine.threads() >= 1

def test_paths(dataset, tmp_path, monkeypatch):
    """~ in a flag, a file and a plain argument; a run finds its dataset from any folder."""
    (tmp_path / 'c.py').write_text('out_dir = "~/out"\n')
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = configure('plot.py', ['~/x', f'{tmp_path}/c.py'], positional=True)
    assert cfg.paths == [f'{tmp_path}/x'] and cfg.overrides['out_dir'] == f'{tmp_path}/out'
    assert configure('train.py', ['--run=~/r']).run == f'{tmp_path}/r'
    data = shards.read(dataset)                             # and rows of one topic: P and within are not defined
    arrays = {name: getattr(data, name) for name in ('train', 'train_topics', 'val', 'val_topics')}
    for name in ('train_topics', 'val_topics'):
        arrays[name] = arrays[name][:, :1].repeat(arrays[name].shape[1], 1)
    shards.write(f'{tmp_path}/own_data', arrays, {key: data.meta[key] for key in shards.NEEDED})
    succeeds(run('train.py', *TINY, '--data_dir=own_data', '--max_iters=2', '--run=out/r', cwd=tmp_path))
    succeeds(run('analyze.py', f'--run={tmp_path}/out/r', '--null_draws=9'))
    row = runs.read_row(f'{tmp_path}/out/r')
    assert row['references']['filter'] is row['excess'] is None                # of own data nothing is known
    assert row['mean']['score_p'] is row['mean']['within'] is row['mean']['score_o'] is None
    for script in ('plot.py', 'report.py'):
        succeeds(run(script, f'{tmp_path}/out'))
