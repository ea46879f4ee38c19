"""The real scripts, tiny, as a person would type them; and what they say to bad input."""
import contextlib
import glob
import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import termios
import time
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch

import plot
import run_experiment
import runs
import shards
from configurator import SCRIPTS, Patient, configure
from test_train import (ENV, HERE, TINY, command, dataset, refuses, run,         # noqa: F401 (dataset is a fixture)
                        spawn, succeeds)

ARMS = ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_shuffled_pure', 'gqa_topic_ordered')
EXPERIMENT = f"""
data_dir, out_dir = 'data/tiny', 'out/tiny'
arms = {ARMS}
chain, beta, n_groups, repeats = 'group', 2.0, 4, False
n_topics, vocab_size, block_size, min_segment_len = 3, 16, 48, 9
train_rows, val_rows = 60, 40
n_layer, n_embd, n_head, head_dim, mlp_hidden = 2, 16, 2, 8, 24
batch_size, max_iters, eval_interval = 4, 12, 6
recal_iters, course_seeds = (0.5, 2), 1
null_draws, analysis_rows, lens_rows = 20, 24, 16
"""

@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """One experiment, run in a folder in which the tests here then stay; what it printed."""
    with contextlib.chdir(tmp_path_factory.mktemp('workspace')):
        runs.write_text('tiny.py', EXPERIMENT)
        yield succeeds(spawn(command('run_experiment.py', 'tiny.py', '--seeds=0,1', '--publish=True'))).stdout

# -----------------------------------------------------------------------------
# an experiment, end to end

def rows_of(folder):
    """{(condition, seed, recal_steps): row} of an experiment."""
    return {(r['condition'], r['seed'], r['recal_steps']): r for r in runs.read_rows(folder)[1]}

def without(rows, *keys):
    return {name: {k: v for k, v in r.items() if k not in keys} for name, r in rows.items()}

def test_experiment(workspace):
    _, rows = runs.read_rows('out/tiny')
    assert len(rows) == 5 * (1 + 2 * 2) + 5 * (1 + 2)           # rope + {drope, kept} x two lengths, then one
    assert {r['condition'] for r in rows} == {f'{arm}_{kind}' for arm in ARMS for kind in ('rope', 'drope', 'kept')}
    r = rows_of('out/tiny')['gqa_topic_ordered_drope', 1, 6]
    assert r['excess'] == pytest.approx(r['val_loss'] - r['references']['filter'], abs=2e-8)   # rows have nine digits
    assert np.shape(r['heads']['score_p']) == (2, 2)
    assert len(r['probe']['accuracy']) == len(r['probe']['references']['control']) == 3
    assert np.mean(r['heads']['entropy']) == pytest.approx(r['mean']['entropy']) and r['uniform']['qk_rank'] > 1
    assert len(r['lens']['projection']['chance']) == 5 and r['config']['parent_order'] == 'topic'
    log = runs.read_log('out/tiny/gqa_topic_ordered_drope/seed1')
    assert r['val_loss'] == float(f'{log[-1]["val_loss"]:.9g}') and np.sum(r['curve']['topics']) == 6 * 4
    text = open('out/tiny/summary.md').read()
    for part in ('The probe and its references', 'Circuits', 'Paired differences', 'At equal loss', 'Realised order'):
        assert f'## {part}\n' in text
    printed = workspace                                     # the plan, a line a run, the first part of the report
    lines = [line for line in printed.split('\n') if line.startswith('out/tiny/')]
    page = lines.pop()
    assert '40 runs' in printed.split('\n', 1)[0] and len(lines) == 40 and all(': val loss' in line for line in lines)
    assert page.startswith('out/tiny/mha_shuffled_rope/seed0/view.html: ')
    assert printed.count('\n') < 90 and text.split('\n## ')[0] in printed and 'figures: out/tiny/figures' in printed
    for path in glob.glob('out/tiny/**/*.json*', recursive=True):   # no NaN anywhere
        if not path.endswith('.lock'):
            assert 'NaN' not in open(path).read() and 'Infinity' not in open(path).read()

def test_two_parts_on_one_folder(workspace):
    """One killed and started again, on data of its own: the rows of one process. The last to end reports."""
    args = ['tiny.py', '--seeds=0,1', '--arms=mha_shuffled,mha_topic_ordered', '--data_dir=data/parts',
            '--out_dir=out/parts']
    part = command('run_experiment.py', *args, '--part=1/2')
    killed = subprocess.Popen(part, env=ENV, stdout=subprocess.PIPE, text=True)
    assert any(': val loss' in line for line in killed.stdout)             # it has a run
    killed.kill()
    second = succeeds(run('run_experiment.py', *args, '--part=2/2'))
    assert 'part 2/2 is done; ' in second.stdout and not os.path.exists('out/parts/summary.md')
    assert 'to do: 2 of 2' in succeeds(run('run_experiment.py', *args, '--part=1/2')).stdout
    parts, whole = (without(rows_of(f'out/{name}'), 'seconds', 'config') for name in ('parts', 'tiny'))
    assert len(parts) == 16 and parts.items() <= whole.items() and os.path.exists('out/parts/figures/loss.png')
    refuses(run('run_experiment.py', *args, '--part=3/2'), 'part = 3/2', 'is the second of eight')

def test_recalibration_reads_mixed_rows_in_every_arm(workspace):
    config = lambda name: runs.read_config(f'out/tiny/{name}/seed0')
    assert config('mha_shuffled_pure_rope')['max_segments'] == 1
    for kind in ('drope', 'kept'):
        pure, mixed = config(f'mha_shuffled_pure_{kind}'), config(f'mha_shuffled_{kind}')
        assert {k for k in pure if pure[k] != mixed[k]} == {'parent', 'parent_max_segments'}
    digests = [torch.load(f'out/tiny/{arm}_drope/seed0/ckpt.pt', weights_only=True)['rows']
               for arm in ('mha_shuffled', 'mha_topic_c4', 'mha_shuffled_pure')]
    assert len(set(digests)) == 1

def test_published_figures_can_be_drawn_again(workspace, tmp_path):
    """Report and figures come from the published rows alone, and are the same to the byte."""
    assert set(os.listdir('results/tiny')) == {'runs.jsonl.xz', 'summary.md', 'examples.json', 'figures'}
    copy = shutil.copytree('results/tiny', tmp_path / 'tiny', ignore=shutil.ignore_patterns('figures'))
    for script in ('plot.py', 'report.py'):
        succeeds(run(script, str(copy)))
    assert len(os.listdir(copy / 'figures')) == 8
    for path in ['summary.md', *(f'figures/{name}' for name in os.listdir(copy / 'figures'))]:
        assert open(f'{copy}/{path}', 'rb').read() == open(f'results/tiny/{path}', 'rb').read(), path

def test_rows_on_disk(workspace, tmp_path):
    """runs.jsonl holds what rows share once, and gives every row its whole config back, also where it is published; one
    that is cut off is refused."""
    header, rows = runs.read_rows('out/tiny')
    made = map(runs.read_row, runs.row_folders('out/tiny'))
    assert rows == sorted(made, key=runs.key) == runs.read_rows('results/tiny')[1]
    assert 'n_layer' in header['config'] and open('out/tiny/runs.jsonl').read().count('"n_layer"') == 1
    for name in ('published/runs.jsonl', 'old/runs.jsonl.gz'):             # of older versions
        runs.write_text(f'{tmp_path}/{name}', '')
    with pytest.raises(SystemExit, match='unpack it with gunzip'):
        runs.read_rows(f'{tmp_path}/old')
    some = shutil.copytree('out/tiny/mha_shuffled_kept', tmp_path / 'some')
    assert runs.read_rows(some) == (None, [])
    header, rows = runs.gather(some, place=f'{tmp_path}/published')
    assert os.listdir(tmp_path / 'published') == ['runs.jsonl.xz']         # and none of an older version
    assert header['compare']['base'] == 'shuffled' and len(rows) == 3
    assert runs.read_rows(some)[1] == runs.read_rows(f'{tmp_path}/published')[1] == rows
    for size in (200, 20):
        os.truncate(tmp_path / 'published/runs.jsonl.xz', size)
        with pytest.raises(SystemExit, match='runs.jsonl.xz: cannot be read'):
            runs.read_rows(f'{tmp_path}/published')

def test_own_dataset_as_an_experiment(workspace):
    """data_script = '': the dataset that is there, for all seeds; without that, nothing is made inside it. Of this one
    nothing is known but its topics, one in each row: with those P and within are not defined."""
    data = shards.read('data/tiny/seed0')
    arrays = {'train': data.train, 'val': data.val}
    for name in arrays.copy():
        arrays[f'{name}_topics'] = np.zeros_like(arrays[name]) + arrays[name][:, :1] % 3
    shards.write('data/own', arrays, {key: data.meta[key] for key in shards.NEEDED})
    args = ['tiny.py', '--data_dir=data/own', '--out_dir=out/own', '--arms=mha_shuffled', '--recal_iters=2']
    refuses(run('run_experiment.py', *args), 'data/own', '--data_script=')
    refuses(run('data_synth.py', 'tiny.py', '--data_dir=data/own'), 'data/own', 'dataset')
    succeeds(run('run_experiment.py', *args, '--data_script='))
    rows = runs.read_rows('out/own')[1]
    for row in rows:
        assert row['references']['filter'] is row['excess'] is None
        assert row['mean']['score_p'] is row['mean']['within'] is row['mean']['score_o'] is None
    assert len(rows) == 3 and len(os.listdir('data/own')) == 5

def test_unmasked_columns(workspace, tmp_path):
    """Of a run that finds its dataset from any folder."""
    folder = os.path.abspath('out/tiny/mha_shuffled_rope/seed1')
    succeeds(run('analyze.py', f'--run={folder}', '--causal=False', cwd=tmp_path))
    found = runs.read_json(f'{folder}/unmasked.json')
    assert found['causal'] is False and found['uniform']['entropy'] == pytest.approx(np.log(48))

def test_published_rows_do_not_hide_another_run(workspace):
    """A run with other settings stops the command, though a row with these is published; `main` is the folder's; an
    arm or a seed that is named twice is one."""
    args = ['tiny.py', '--out_dir=other/tiny', '--arms=mha_shuffled,mha_shuffled', '--seeds=0,0']
    config = runs.read_config('out/tiny/mha_shuffled_rope/seed0')
    runs.write_json('other/tiny/mha_shuffled_rope/seed0/config.json', config | {'max_iters': 4})
    refuses(run('run_experiment.py', *args), 'max_iters = 4, here 12')
    shutil.rmtree('other')
    done = succeeds(run('run_experiment.py', *args, '--recal_iters=2,0.5'))
    assert '1 arms x 1 seeds, 5 runs' in done.stdout and 'to do: 0 of 1' in done.stdout
    main = {key[2]: row['main'] for key, row in rows_of('other/tiny').items() if key[0].endswith('drope')}
    assert main == {2: True, 6: False}

def test_experiment_goes_on_where_it_stopped(workspace):
    """What is done is skipped. A row of an older version of the measures is made again where its checkpoint is, and
    kept where it is gone."""
    before = without(rows_of('out/tiny'), 'seconds')
    os.remove('out/tiny/mha_shuffled_rope/seed0/ckpt.pt')              # done all the same: its row is there
    other = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--max_iters=13')
    refuses(other, 'holds a run with other settings (max_iters = 12, here 13)')            # and deletes none
    shutil.rmtree('out/tiny/gqa_topic_ordered_kept/seed0')             # done all the same: it is published
    plan = succeeds(run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--dry_run=True'))
    assert 'to do' not in plan.stdout.split('\n', 1)[1] and '40 runs' in plan.stdout
    refuses(run('run_experiment.py', 'tiny.py', '--seeds=0', '--publish=True'), 'seed 1, which is not in')
    fewer = succeeds(run('run_experiment.py', 'tiny.py', '--seeds=0'))           # the plan alone is reported
    assert 'to do: 0 of 5' in fewer.stdout and len(rows_of('out/tiny')) == 25
    shutil.rmtree('results')
    shutil.rmtree('out/tiny/mha_shuffled_drope/seed0')
    remade, kept = (f'out/tiny/mha_topic_c4_{kind}/seed1' for kind in ('drope', 'kept'))
    for folder in (remade, kept):
        row = runs.read_row(folder)
        row['mean']['score_p'] = 99.0
        runs.write_json(f'{folder}/row.json', row | {'measures_version': 0})
    os.remove(f'{kept}/ckpt.pt')
    status, shown = on_terminal('tiny.py', '--seeds=0,1', '--jobs=2')
    assert status == 0 and '14/14 [' in shown and 'out/tiny/mha_shuffled_' in shown, shown     # drope: 6 steps, 2; 6
    assert 'val loss' not in shown and '| mha_topic_c4_drope ' in shown        # one bar, then the report
    after = without(rows_of('out/tiny'), 'seconds')
    assert after.pop(('mha_topic_c4_kept', 1, 6))['measures_version'] == 0
    assert after.items() <= before.items() and len(after) == 39                # the same seed, the same run
    assert re.search(r'\| mha_topic_c4_kept +(\|[^|]+){4}\| — ', open('out/tiny/summary.md').read())       # P

def on_terminal(*args):
    """(exit status, what is shown) of an experiment on a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 150))
    line = command('run_experiment.py', *args)
    process = subprocess.Popen(line, env=ENV, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):                      # Linux's way to say that they have closed it
        while chunk := os.read(ours, 9999):
            shown += chunk
    return process.wait(), shown.decode()

ONE_ARM = ['tiny.py', '--arms=mha_shuffled', '--recal_iters=2']

def test_the_second_writer_is_refused(workspace):
    os.makedirs('data/one/seed0.tmp-1')                     # the user's own, like a temporary of ours by its name
    succeeds(run('train.py', 'tiny.py', '--run=out/one'))
    with runs.locked('out/one'), runs.locked('data/one/seed0'), runs.locked('out/one/mha_shuffled_rope/seed0/arm'):
        refuses(run('train.py', 'tiny.py', '--run=out/one'), 'out/one', 'at work')
        refuses(run('analyze.py', '--run=out/one'), 'out/one', 'at work')
        refuses(run('data_synth.py', 'tiny.py', '--data_dir=data/one'), 'data/one/seed0', 'at work')
        refuses(run('run_experiment.py', *ONE_ARM, '--out_dir=out/one'), 'mha_shuffled_rope/seed0/arm', 'at work')
    assert os.path.exists('out/one/ckpt.pt') and not os.path.exists('out/one/row.json')
    succeeds(run('data_synth.py', 'tiny.py', '--data_dir=data/one'))
    assert os.path.isdir('data/one/seed0.tmp-1')

def test_sigterm_ends_the_children_too(workspace):
    """A long training, other arms in the queue: after SIGTERM no process is left that has its stderr."""
    args = ['tiny.py', '--arms=mha_topic_ordered,mha_shuffled,mha_pseudo', '--max_iters=100000', '--out_dir=out/ended']
    process = subprocess.Popen(command('run_experiment.py', *args), env=ENV, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not os.path.exists('out/ended/mha_topic_ordered_rope/seed0/log.jsonl') and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    try:
        assert 'the same command goes on' in process.communicate(timeout=60)[1] and process.returncode == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

def test_sizes_nobody_thought_of(workspace, capfd):
    """Rows shorter than the least distance of P; more topics than the width of the states, and than colours. And
    numbers come before pictures: they are there where those can't be drawn."""
    odd = [*ONE_ARM, '--n_topics=11', '--vocab_size=44', '--block_size=12', '--min_segment_len=2', '--n_embd=6',
           '--data_dir=data/odd', '--out_dir=out/odd']
    with patch.object(plot, 'main', side_effect=OSError(28, 'No space left on device')):
        refuses(run('run_experiment.py', *odd), 'No space left')
    assert '| mha_shuffled_rope ' in open('out/odd/summary.md').read()
    row = runs.read_row('out/odd/mha_shuffled_rope/seed0')
    assert row['mean']['score_p'] is None and np.shape(row['curve']['topics'])[1] == 11
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.simplefilter('error', RuntimeWarning)
        succeeds(run('run_experiment.py', *odd))
    workers = capfd.readouterr()
    assert 'Warning' not in workers.err and 'P —' in workers.out

def test_output_stops_nothing(workspace):
    """A reader that has left, a full disk, closed streams, ASCII alone: the report is written all the same."""
    line = shlex.join(command('run_experiment.py', *ONE_ARM, '--out_dir=out/told', '--publish=True'))
    for streams, unbuffered in (('2>&1 | head -c 1', ''), ('> /dev/full 2>&-', '1')):          # to write, or to flush
        shutil.rmtree('out/told', ignore_errors=True)       # published, the second time: nothing is to do
        told = ['bash', '-c', f'{line} {streams}; exit ${{PIPESTATUS[0]}}']
        done = succeeds(spawn(told, env={'PYTHONUNBUFFERED': unbuffered}))
        assert not done.stderr and os.path.exists('out/told/summary.md'), done.stderr
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    print('—', file=Patient(ascii_only), flush=True)
    assert ascii_only.buffer.getvalue() == b'?\n'

# -----------------------------------------------------------------------------
# rows and names

def test_names_and_columns():
    """A name is taken apart into settings, and made again from the columns of a run with those."""
    for arm in ('mha_shuffled', 'gqa_topic_ordered', 'mha_topic_c4_cd20', 'mha_pseudo_c16', 'mha_shuffled_pure',
                'mha_easy_first_c2_cd5_pure', 'gqa_shuffled_nope', 'mha_reshuffled', 'mha_shuffled_pure_rerun'):
        settings = runs.arm_settings(arm, 8)
        config = settings | {'n_head': 8, 'seed': 3, 'recal_steps': None, 'max_segments': 1 if settings['pure'] else 5}
        name = arm if arm.endswith('nope') else arm + '_rope'
        assert runs.columns(config)['condition'] == name
        parent = {f'parent_{key}': config[key] for key in ('order', 'cycles', 'cooldown', 'max_segments')}
        recal = config | parent | {'order': 'shuffled', 'max_segments': 5, 'recal_steps': 9, 'keep_rope': False}
        assert runs.columns(recal)['condition'] == name.rsplit('_', 1)[0] + '_drope'
    assert runs.recal_folder('out/x/mha_shuffled_rope/seed1/', True) == 'out/x/mha_shuffled_kept/seed1'
    assert runs.recal_folder('out/mine', False, 20) == 'out/mine_drope/recal_20'

def test_a_new_key_does_not_void_old_runs():
    old = {'max_iters': 5, 'seed': 0}
    assert runs.differences(old | {'cooldown': 0.0, 'data_dir': 'elsewhere'}, old) == []
    assert runs.differences(old | {'cooldown': 0.1}, old) == ['cooldown']
    assert runs.differences(old | {'data_seed': 1}, old | {'data_seed': None}) == []       # not known there
    assert runs.differences(old | {'data_seed': 1}, old | {'data_seed': 0}) == ['data_seed']

def test_orderedness_and_curve():
    bins = lambda *counts: [{'topics': list(c)} for c in counts]
    assert runs.orderedness(bins((10, 0), (0, 10)), 'topics') == pytest.approx(1)
    assert runs.orderedness(bins((5, 5), (5, 5)), 'topics') == pytest.approx(0)
    assert 0.1 < runs.orderedness(bins((8, 2), (2, 8)), 'topics') < 0.5
    assert runs.orderedness([{'topics': [0, 0]}], 'tokens') is runs.orderedness(bins((5, 0), (4, 0)), 'topics') is None
    records = [{'step': i, 'loss': float(i), 'val_loss': i / 2 if i % 50 == 0 else None, 'lr': 0.1, 'topics': [1, i]}
               for i in range(1001)]
    found = runs.curve(records)
    assert 90 < len(found['step']) <= 120 and found['step'][-1] == 1000 and np.sum(found['topics'], 0)[0] == 1001
    assert [v for v in found['val_loss'] if v is not None] == [i / 2 for i in range(0, 1001, 50)]

def test_other_positions_are_not_dropped(monkeypatch):
    """Beside RoPE: what became of them would have the names of RoPE's."""
    monkeypatch.setitem(runs.POSITIONS, 'far', {'rope': True, 'rope_theta': 1e9})
    cfg = configure('run_experiment.py', [], stages=SCRIPTS)
    rope, far = (run_experiment.arm_runs(cfg, f'mha_shuffled{end}', 0) for end in ('', '_far'))
    assert len(rope) == 3 and [run.folder for run in far] == ['out/single/mha_shuffled_far/seed0']

# -----------------------------------------------------------------------------
# bad input: one line that names the culprit, a non-zero exit, nothing lost

@pytest.mark.parametrize('line, words', (
    ('train.py --max_iters=many', ('max_iters', "'many'", 'int')),
    ('train.py --chain=group', ("'chain'",)),                                  # a key of another script
    ('train.py --max_iters', ('--max_iters=value',)),
    ('train.py max_iters=5', ('max_iters=5',)),
    ('train.py config/nothing.py', ('config/nothing.py',)),
    ('train.py --data_dir=nowhere', ('nowhere', 'data_synth.py')),
    ('train.py --device=cuda', ('cuda',)),
    ('train.py --dtype=half', ('half', 'bfloat16')),
    ('train.py HERE/config/demo.py --data_dir=DATASET', ('vocab_size = 20', '64')),
    ('train.py --data_dir=DATASET --order=sorted', ('order = sorted', 'pseudo')),
    ('drope.py', ('--run=',)),
    ('export_hf.py', ('--run=',)),
    ('plot.py none', ('none',)),
    ('analyze.py', ('--run=', 'no run here')),
    ('run_experiment.py --seed=3', ('seed = 3', 'seeds')),
    ('run_experiment.py --arms=mha_sorted', ('sorted', 'pseudo')),
    ('run_experiment.py --arms=sorted', ('sorted', 'topic_ordered')),
    ('run_experiment.py --arms=mha_shuffled_c4', ('mha_shuffled_c4', 'mha_shuffled')),
    ('run_experiment.py --arms=mha_shuffled,mha_shuffled_rope', ('mha_shuffled_rope', 'right name')),
    ('run_experiment.py --recal_iters=0', ('recal_iters',)),
    ('run_experiment.py --recal_iters=0.5,6 --max_iters=12', ('recal_iters', 'differ')),
    ('run_experiment.py --recal_iters=2.5', ('recal_iters = 2.5', 'whole steps')),
    ('run_experiment.py --primary=qk_rank,topic_ordered,drope', ('qk_rank', 'score_p')),
    ('run_experiment.py --base=shufled', ('shufled', 'shuffled')),
    ('run_experiment.py --data_script=nothing.py', ('nothing.py',)),
    ('run_experiment.py --data_script=report.py', ('report.py', 'makes no data')),
    ('run_experiment.py --data_script=a/report.py', ('a/report.py', 'beside this one')),
    ('data_synth.py --chain=bigram', ("chain = 'bigram': choose range or group",)),
    ('data_synth.py --chain=group --n_groups=7 --vocab_size=64', ('n_groups = 7 does not cut vocab_size = 64',)),
    ('data_synth.py --n_topics=40 --vocab_size=64', ('need 83',)),
    ('data_synth.py --min_segment_len=20 --block_size=63', ('5 segments of min_segment_len = 20 do not fit', '64')),
    ('data_synth.py --min_segments=4 --max_segments=3', ('max_segments = 3: must be at least min_segments = 4',)),
    ('data_synth.py --n_topics=1 --repeats=False', ('n_topics = 1: without repeats',)),
    ('data_synth.py --device=tpu9', ('device = tpu9',))))
def test_bad_flags(line, words, dataset, tmp_path):
    line = line.replace('HERE', HERE).replace('DATASET', dataset)
    refuses(run(*line.split(), cwd=tmp_path), *words)
    assert not os.listdir(tmp_path)                         # nothing is left behind

def test_bad_runs(dataset, tmp_path):
    good, out = [*TINY, f'--data_dir={dataset}', '--max_iters=4'], str(tmp_path / 'out')
    refuses(run('train.py', *good, '--n_kv_head=3', f'--run={out}'), 'n_head = 2', 'n_kv_head = 3')
    refuses(run('train.py', *good, '--batch_size=6', '--grad_accum=4', f'--run={out}'), 'batch_size = 6')
    (tmp_path / 'file').write_text('')
    refuses(run('train.py', *good, f'--run={tmp_path}/file/run'), 'file/run', 'cannot be written')
    succeeds(run('train.py', *good, f'--run={out}'))
    runs.write_json(f'{out}/row.json', [1])
    refuses(run('report.py', str(tmp_path)), 'row.json', 'not a row of ours')
    os.rename(f'{out}/log.jsonl', f'{out}/log')
    for lines in ([], open(f'{out}/log').readlines()[:-1]):
        open(f'{out}/log.jsonl', 'w').writelines(lines)
        refuses(run('analyze.py', f'--run={out}'), 'log.jsonl', 'is gone')
    os.rename(f'{out}/log', f'{out}/log.jsonl')
    before = open(f'{out}/ckpt.pt', 'rb').read()
    refuses(run('train.py', *good, '--muon_lr=0.01', f'--run={out}'), out, 'muon_lr = 0.02', '0.01')   # another run's
    assert open(f'{out}/ckpt.pt', 'rb').read() == before
    for content in (before[:len(before) // 2], b'hello'):
        open(f'{out}/ckpt.pt', 'wb').write(content)
        refuses(run('train.py', *good, f'--run={out}'), 'ckpt.pt', 'not a readable checkpoint')
        refuses(run('analyze.py', f'--run={out}'), 'ckpt.pt', 'not a readable checkpoint')
    torch.save({'weights': torch.zeros(3)}, f'{out}/ckpt.pt')
    refuses(run('drope.py', f'--run={out}'), 'ckpt.pt', 'not one of ours')
    os.remove(f'{out}/ckpt.pt')
    refuses(run('analyze.py', f'--run={out}'), 'ckpt.pt', 'no checkpoint')
    open(f'{out}/config.json', 'w').write('{"hidden_size": 16}')
    refuses(run('drope.py', f'--run={out}'), 'config.json', 'not of one of our runs')

def test_divergence_memory_and_compile_stop_with_one_line(workspace, tmp_path):
    refuses(run('train.py', 'tiny.py', '--run=out/a', '--muon_lr=1e30'), 'loss is', 'step', '--muon_lr')
    refuses(run('train.py', 'tiny.py', '--run=out/b', '--mlp_hidden=2000000000'), 'out of memory', '--grad_accum')
    line = command('train.py', 'tiny.py', '--run=out/c', '--compile=True')
    done = spawn(line, env={'CXX': '/nonexistent', 'TORCHINDUCTOR_CACHE_DIR': f'{tmp_path}/cache'})
    refuses(done, 'torch.compile failed', '--compile=False')

def test_no_file_is_wide():
    for path in glob.glob(os.path.join(HERE, '*.py')):
        assert max(map(len, open(path).read().splitlines())) <= 120, path
