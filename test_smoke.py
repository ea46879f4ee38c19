"""The real scripts, tiny, as a person would type them; and what they say to bad input."""
import contextlib
import fcntl
import glob
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios

import numpy as np
import pytest
import torch

import measures
import report
import run_experiment
import runs
from configurator import SCRIPTS, block, configure
from runs import curve, orderedness
from test_train import (ENV, HERE, TINY, command, dataset, refuses, run,         # noqa: F401 (dataset is a fixture)
                        spawn, succeeds)

EXPERIMENT = """
data_dir, out_dir = 'data/tiny', 'out/tiny'
arms = ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_shuffled_pure', 'gqa_topic_ordered')
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
    """A folder with one experiment run in it."""
    here = tmp_path_factory.mktemp('workspace')
    (here / 'tiny.py').write_text(EXPERIMENT)
    done = succeeds(spawn(command('run_experiment.py', 'tiny.py', '--seeds=0,1', '--publish=True'), here))
    return str(here), done.stdout

# -----------------------------------------------------------------------------
# an experiment, end to end

def rows_of(folder):
    """{(condition, seed, recal_steps): row} of an experiment."""
    return {(r['condition'], r['seed'], r['recal_steps']): r for r in runs.read_rows(folder)[1]}

def untimed(rows):
    return {key: {k: v for k, v in r.items() if k != 'seconds'} for key, r in rows.items()}

def test_experiment(workspace):
    here, printed = workspace
    header, rows = runs.read_rows(f'{here}/out/tiny')
    assert len(rows) == 5 * (1 + 2 * 2) + 5 * (1 + 2)           # rope + {drope, kept} x two lengths, then one
    assert {r['condition'] for r in rows} == {
        f'{arm}_{kind}' for arm in ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_shuffled_pure',
                                    'gqa_topic_ordered') for kind in ('rope', 'drope', 'kept')}
    r = rows_of(f'{here}/out/tiny')['gqa_topic_ordered_drope', 1, 6]
    assert (r['attention'], r['order'], r['cycles'], r['cooldown'], r['pure'], r['positions'], r['main']) == (
        'gqa', 'topic', 1, 0.0, False, 'drope', True)
    reference = r['references']
    assert reference['oracle'] < reference['filter'] < reference['bigram'] < reference['uniform']
    assert r['measures_version'] == measures.VERSION
    assert r['excess'] == pytest.approx(r['val_loss'] - reference['filter'], abs=2e-8)      # rows have nine digits
    assert np.shape(r['heads']['score_p']) == (2, 2)
    assert len(r['probe']['accuracy']) == len(r['probe']['references']['control']) == 3
    assert np.mean(r['heads']['entropy']) == pytest.approx(r['mean']['entropy']) and r['uniform']['qk_rank'] > 1
    assert len(r['lens']['projection']['chance']) == 5 and r['config']['parent_order'] == 'topic'
    log = runs.read_log(f'{here}/out/tiny/gqa_topic_ordered_drope/seed1')
    assert r['val_loss'] == float(f'{log[-1]["val_loss"]:.9g}') and np.sum(r['curve']['topics']) == 6 * 4
    for name in ('loss', 'order', 'heads', 'maps', 'probe', 'effects', 'course', 'lens'):
        assert os.path.getsize(f'{here}/out/tiny/figures/{name}.png') > 5000
    text = open(f'{here}/out/tiny/summary.md').read()
    for part in ('The probe and its references', 'Circuits', 'Paired differences', 'At equal loss', 'Realised order'):
        assert f'## {part}\n' in text
    # printed: the plan, a line a run, the first part of the report
    plan, lines = printed.split('\n', 1)[0], [line for line in printed.split('\n') if line.startswith('out/tiny/')]
    page = lines.pop()
    assert '40 runs' in plan and len(lines) == 40 and all(': val loss' in line for line in lines)
    assert page.startswith('out/tiny/mha_shuffled_rope/seed0/view.html: ')
    assert printed.count('\n') < 90 and text.split('\n## ')[0] in printed and 'figures: out/tiny/figures' in printed
    contrasts = {tuple(e['arms']) for e in report.effects(header, rows)}
    assert {(f'mha_{order}', 'mha_shuffled') for order in ('topic_ordered', 'topic_c4', 'shuffled_pure')} <= contrasts
    for path in glob.glob(f'{here}/out/tiny/**/*.json*', recursive=True):   # no NaN anywhere
        if not path.endswith('.lock'):
            assert 'NaN' not in open(path).read() and 'Infinity' not in open(path).read()

def test_two_parts_on_one_folder(workspace):
    """One killed and started again, on data of its own: the rows of one process. The last to end reports."""
    here, _ = workspace
    args = ['tiny.py', '--seeds=0,1', '--arms=mha_shuffled,mha_topic_ordered', '--data_dir=data/parts',
            '--out_dir=out/parts']
    part = command('run_experiment.py', *args, '--part=1/2')
    killed = subprocess.Popen(part, cwd=here, env=ENV, stdout=subprocess.PIPE, text=True)
    assert any(': val loss' in line for line in killed.stdout)             # it has a run
    killed.kill()
    second = succeeds(run('run_experiment.py', *args, '--part=2/2', cwd=here))
    assert 'part 2/2 is done; ' in second.stdout
    assert not os.path.exists(f'{here}/out/parts/summary.md')
    assert 'to do: 2 of 2' in succeeds(run('run_experiment.py', *args, '--part=1/2', cwd=here)).stdout
    parts, whole = rows_of(f'{here}/out/parts'), rows_of(f'{here}/out/tiny')
    assert len(parts) == 16 and os.path.exists(f'{here}/out/parts/figures/loss.png')
    strip = lambda row: {k: v for k, v in row.items() if k not in ('seconds', 'config')}
    assert all(strip(row) == strip(whole[key]) for key, row in parts.items())
    refuses(run('run_experiment.py', *args, '--part=3/2', cwd=here), 'part = 3/2', 'is the second of eight')

def test_recalibration_reads_mixed_rows_in_every_arm(workspace):
    here, _ = workspace
    config = lambda name: runs.read_config(f'{here}/out/tiny/{name}/seed0')
    assert config('mha_shuffled_pure_rope')['max_segments'] == 1
    for kind in ('drope', 'kept'):
        pure, mixed = config(f'mha_shuffled_pure_{kind}'), config(f'mha_shuffled_{kind}')
        assert {k for k in pure if pure[k] != mixed[k]} == {'parent', 'parent_max_segments'}
        assert pure['max_segments'] == 5
    digests = [torch.load(f'{here}/out/tiny/{arm}_drope/seed0/ckpt.pt', weights_only=True)['rows']
               for arm in ('mha_shuffled', 'mha_topic_c4', 'mha_shuffled_pure')]
    assert len(set(digests)) == 1

@pytest.mark.parametrize('script', ['analyze.py', 'drope.py'])
def test_another_dataset_in_its_place(workspace, script, tmp_path):
    """A run whose dataset was made again with other chains is not measured on those, and says so in one line."""
    here, kind = workspace[0], 'rope' if script == 'drope.py' else 'drope'
    shutil.copytree(f'{here}/data/tiny', tmp_path / 'data')
    shutil.copytree(f'{here}/out/tiny/mha_shuffled_{kind}/seed1', tmp_path / 'run')
    config = runs.read_config(tmp_path / 'run') | {'data_dir': str(tmp_path / 'data')}
    runs.write_json(f'{tmp_path}/run/config.json', config)
    meta = runs.read_json(tmp_path / 'data/seed1/meta.json')
    runs.write_json(f'{tmp_path}/data/seed1/meta.json', meta | {'beta': 1.5})
    done = run(script, f'--run={tmp_path}/run', cwd=here)
    refuses(done, 'wants another dataset', 'beta = 1.5 there, here 2.0')

def test_published_figures_can_be_drawn_again(workspace, tmp_path):
    """Report and figures come from the published rows alone, and are the same to the byte."""
    results = f'{workspace[0]}/results/tiny'
    assert set(os.listdir(results)) == {'runs.jsonl.xz', 'summary.md', 'examples.json', 'figures'}
    copy = shutil.copytree(results, tmp_path / 'tiny', ignore=shutil.ignore_patterns('figures'))
    for script in ('plot.py', 'report.py'):
        succeeds(run(script, str(copy)))
    assert len(os.listdir(copy / 'figures')) == 8
    for path in ['summary.md', *(f'figures/{name}' for name in os.listdir(copy / 'figures'))]:
        assert open(f'{copy}/{path}', 'rb').read() == open(f'{results}/{path}', 'rb').read(), path

def test_own_dataset_as_an_experiment(workspace):
    """data_script = '': the dataset that is there, for all seeds; without that, nothing is made inside it."""
    here, _ = workspace
    shutil.copytree(f'{here}/data/tiny/seed0', f'{here}/data/own')
    args = ['tiny.py', '--data_dir=data/own', '--out_dir=out/own', '--arms=mha_shuffled', '--recal_iters=2']
    refuses(run('run_experiment.py', *args, cwd=here), 'data/own', '--data_script=')
    refuses(run('data_synth.py', 'tiny.py', '--data_dir=data/own', cwd=here), 'data/own', 'dataset')
    succeeds(run('run_experiment.py', *args, '--data_script=', cwd=here))
    assert len(rows_of(f'{here}/out/own')) == 3
    assert sorted(os.listdir(f'{here}/data/own')) == sorted(os.listdir(f'{here}/data/tiny/seed0'))

def test_unmasked_columns(workspace):
    here, _ = workspace
    succeeds(run('analyze.py', '--run=out/tiny/mha_shuffled_rope/seed1', '--causal=False', cwd=here))
    found = runs.read_json(f'{here}/out/tiny/mha_shuffled_rope/seed1/unmasked.json')
    assert found['causal'] is False and found['uniform']['entropy'] == pytest.approx(np.log(48))

def test_published_rows_do_not_hide_another_run(workspace):
    """A run with other settings stops the command, though a row with these is published; `main` is the folder's; an
    arm or a seed that is named twice is one."""
    here, _ = workspace
    os.rename(f'{here}/out/tiny', f'{here}/out/aside')
    args, name = ('tiny.py', '--arms=mha_shuffled,mha_shuffled', '--seeds=0,0'), 'tiny/mha_shuffled_rope/seed0'
    config = runs.read_config(f'{here}/out/aside/mha_shuffled_rope/seed0')
    runs.write_json(f'{here}/out/{name}/config.json', config | {'max_iters': 4})
    refuses(run('run_experiment.py', *args, cwd=here), 'max_iters = 4, here 12')
    shutil.rmtree(f'{here}/out/tiny')
    done = succeeds(run('run_experiment.py', *args, '--recal_iters=2,0.5', cwd=here))
    assert '1 arms x 1 seeds, 5 runs' in done.stdout and 'to do: 0 of 1' in done.stdout
    main = {key[2]: row['main'] for key, row in rows_of(f'{here}/out/tiny').items() if key[0].endswith('drope')}
    assert main == {2: True, 6: False}
    shutil.rmtree(f'{here}/out/tiny')
    os.rename(f'{here}/out/aside', f'{here}/out/tiny')

def test_experiment_goes_on_where_it_stopped(workspace):
    """What is done is skipped. A row of an older version of the measures is made again where its checkpoint is, and
    kept where it is gone."""
    here, _ = workspace
    before = untimed(rows_of(f'{here}/out/tiny'))
    os.remove(f'{here}/out/tiny/mha_shuffled_rope/seed0/ckpt.pt')              # done all the same: its row is there
    other = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--max_iters=13', cwd=here)
    refuses(other, 'holds a run with other settings (max_iters = 12, here 13)')            # and deletes none
    shutil.rmtree(f'{here}/out/tiny/gqa_topic_ordered_kept/seed0')             # done all the same: it is published
    plan = succeeds(run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--dry_run=True', cwd=here))
    assert 'to do' not in plan.stdout.split('\n', 1)[1] and '40 runs' in plan.stdout
    refuses(run('run_experiment.py', 'tiny.py', '--seeds=0', '--publish=True', cwd=here), 'seed 1, which is not in')
    fewer = succeeds(run('run_experiment.py', 'tiny.py', '--seeds=0', cwd=here))           # the plan alone is reported
    assert 'to do: 0 of 5' in fewer.stdout and len(rows_of(f'{here}/out/tiny')) == 25
    shutil.rmtree(f'{here}/results')
    shutil.rmtree(f'{here}/out/tiny/mha_shuffled_drope/seed0')
    remade, kept = (f'{here}/out/tiny/mha_topic_c4_{kind}/seed1' for kind in ('drope', 'kept'))
    for folder in (remade, kept):
        row = runs.read_row(folder)
        row['mean']['score_p'] = 99.0
        runs.write_json(f'{folder}/row.json', row | {'measures_version': 0})
    os.remove(f'{kept}/ckpt.pt')
    status, shown = on_terminal(here, 'tiny.py', '--seeds=0,1', '--jobs=2')
    assert status == 0 and '14/14 [' in shown and 'out/tiny/mha_shuffled_' in shown, shown     # drope: 6 steps, 2; 6
    assert 'val loss' not in shown and '| mha_topic_c4_drope ' in shown        # one bar, then the report
    after = untimed(rows_of(f'{here}/out/tiny'))
    assert after.pop(('mha_topic_c4_kept', 1, 6))['measures_version'] == 0
    assert after.items() <= before.items() and len(after) == 39                # the same seed, the same run
    assert re.search(r'\| mha_topic_c4_kept +(\|[^|]+){4}\| — ', open(f'{here}/out/tiny/summary.md').read())       # P

def on_terminal(cwd, *args):
    """(exit status, what is shown) of an experiment on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 40, 150, 0, 0))
    line = command('run_experiment.py', *args)
    process = subprocess.Popen(line, cwd=cwd, env=ENV, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):                      # Linux's way to say that they have closed it
        while chunk := os.read(ours, 9999):
            shown += chunk
    return process.wait(), shown.decode()

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

def test_rows_on_disk(tmp_path):
    """runs.jsonl holds what rows share once, and gives every row its whole config back, also where it is published; one
    that is cut off is refused."""
    made = []
    for seed, steps in ((0, 9), (1, 9), (0, 5)):
        columns = runs.OLDER | {'condition': 'mha_shuffled_rope', 'attention': 'mha', 'order': 'shuffled', 'cycles': 1,
                   'cooldown': 0.0, 'pure': False, 'positions': 'rope', 'seed': seed, 'recal_steps': steps}
        config = {'seed': seed, 'max_iters': steps, 'n_layer': 2}
        made.append(columns | {'device': 'none', 'versions': {}, 'config': config})
        runs.write_json(f'{tmp_path}/a/{len(made)}/row.json', made[-1])
    header, rows = runs.gather(f'{tmp_path}/a')
    assert header['compare']['base'] == 'shuffled' and sorted(rows, key=str) == sorted(made, key=str)
    text = open(f'{tmp_path}/a/runs.jsonl').read()
    assert json.loads(text.splitlines()[0])['config'] == {'n_layer': 2} and text.count('n_layer') == 1
    assert runs.read_rows(f'{tmp_path}/a')[1] == rows
    shutil.rmtree(tmp_path / 'a' / '2')
    assert len(runs.gather(f'{tmp_path}/a')[1]) == 2 and runs.read_rows(str(tmp_path)) == (None, [])
    for name in ('c/runs.jsonl', 'd/runs.jsonl.gz'):        # of older versions
        runs.write_text(f'{tmp_path}/{name}', '')
    with pytest.raises(SystemExit, match='unpack it with gunzip'):
        runs.read_rows(f'{tmp_path}/d')
    _, rows = runs.gather(f'{tmp_path}/a', place=f'{tmp_path}/c')
    assert os.listdir(tmp_path / 'c') == ['runs.jsonl.xz'] and runs.read_rows(f'{tmp_path}/c')[1] == rows
    for size in (200, 20):
        os.truncate(tmp_path / 'c' / 'runs.jsonl.xz', size)
        with pytest.raises(SystemExit, match='runs.jsonl.xz: cannot be read'):
            runs.read_rows(f'{tmp_path}/c')

def test_orderedness_and_curve():
    bins = lambda *counts: [{'topics': list(c)} for c in counts]
    assert orderedness(bins((10, 0), (0, 10)), 'topics') == pytest.approx(1)
    assert orderedness(bins((5, 5), (5, 5)), 'topics') == pytest.approx(0)
    assert 0.1 < orderedness(bins((8, 2), (2, 8)), 'topics') < 0.5
    assert orderedness([{'topics': [0, 0]}], 'tokens') is None
    records = [{'step': i, 'loss': float(i), 'val_loss': i / 2 if i % 50 == 0 else None, 'lr': 0.1, 'topics': [1, i]}
               for i in range(1001)]
    found = curve(records)
    assert 90 < len(found['step']) <= 120 and found['step'][-1] == 1000 and np.sum(found['topics'], 0)[0] == 1001
    assert [v for v in found['val_loss'] if v is not None] == [i / 2 for i in range(0, 1001, 50)]

# -----------------------------------------------------------------------------
# config

def test_files_before_flags_and_derived_values(tmp_path):
    for path in glob.glob(os.path.join(HERE, 'config', '*.py')):
        assert configure('run_experiment.py', [path], stages=SCRIPTS).overrides
    path = tmp_path / 'c.py'
    path.write_text('_half = 128\nn_embd = 2 * _half\nconcentration = 7\nmax_iters = 5\nrecal_iters = 0.1\n')
    cfg = configure('train.py', ['--max_iters=9', str(path), '--compile=false', '--n_kv_head=none', '--run=123'])
    assert (cfg.n_embd, cfg.max_iters, cfg.compile, cfg.n_kv_head, cfg.run) == (256, 9, False, None, '123')
    assert configure('run_experiment.py', ['--arms=a,b', '--seeds=3']).arms == ('a', 'b')
    cfg = configure('drope.py', [str(path), '--recal_lr_scale=1'])
    assert cfg.recal_iters == (0.1,) and type(cfg.recal_lr_scale[0]) is float and not hasattr(cfg, 'n_embd')

def test_blocks():
    """No number is without a range. A key that two scripts have must mean the same in both: run_experiment.py resolves
    it once. The two makers of data may differ: each has its own where an experiment sets nothing."""
    seen, wiki = {}, block('prepare_wiki.py')
    for script in SCRIPTS:
        for key, default in block(script).items():
            if script != 'prepare_wiki.py':
                assert seen.setdefault(key, default)[:2] == default[:2], f'{key} in {script}'
            assert wiki.get(key, default)[1] == default[1]              # of one type even so
            assert bool(default.range) == (default.kind in (int, float)), f'{key} in {script}'
    cfg = configure('run_experiment.py', ['--data_script=prepare_wiki.py', '--vocab_size=999'], stages=SCRIPTS)
    at = run_experiment.data_stage(cfg, 3, 'mha_shuffled_pure')
    assert (at.n_topics, at.vocab_size, at.max_segments, at.seed) == (wiki['n_topics'][0], 999, 1, 0)
    assert at.data_dir == 'data/wiki_pure' and at.work_dir == 'data/wiki_work'

def test_other_positions_are_not_dropped(monkeypatch):
    """Beside RoPE: what became of them would have the names of RoPE's."""
    monkeypatch.setitem(runs.POSITIONS, 'far', {'rope': True, 'rope_theta': 1e9})
    cfg = configure('run_experiment.py', [], stages=SCRIPTS)
    rope, far = (run_experiment.arm_runs(cfg, f'mha_shuffled{end}', 0) for end in ('', '_far'))
    assert len(rope) == 3 and [run.folder for run in far] == ['out/single/mha_shuffled_far/seed0']

# -----------------------------------------------------------------------------
# bad input: one line that names the culprit, a non-zero exit, nothing lost

@pytest.mark.parametrize('line, words', (
    ('train.py --max_iter=5', ("'max_iter'", "'max_iters'")),
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
    ('view.py', ('--run=',)),
    ('plot.py none', ('none',)),
    ('analyze.py --run=none', ('none', 'no run here')),
    ('run_experiment.py --seed=3', ('seed = 3', 'seeds')),
    ('run_experiment.py --arms=mha_sorted', ('sorted', 'pseudo')),
    ('run_experiment.py --arms=sorted', ('sorted', 'topic_ordered')),
    ('run_experiment.py --arms=mha_shuffled_c4', ('mha_shuffled_c4', 'mha_shuffled')),
    ('run_experiment.py --arms=mha_shuffled,mha_shuffled_rope', ('mha_shuffled_rope', 'right name')),
    ('run_experiment.py --seeds=a', ('seeds', 'int')),
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
        word = 'not a readable checkpoint'
        open(f'{out}/ckpt.pt', 'wb').write(content)
        refuses(run('train.py', *good, f'--run={out}'), 'ckpt.pt', word)
        refuses(run('analyze.py', f'--run={out}'), 'ckpt.pt', word)
    torch.save({'weights': torch.zeros(3)}, f'{out}/ckpt.pt')
    refuses(run('drope.py', f'--run={out}'), 'ckpt.pt', 'not one of ours')
    os.remove(f'{out}/ckpt.pt')
    refuses(run('analyze.py', f'--run={out}'), 'ckpt.pt', 'no checkpoint')
    open(f'{out}/config.json', 'w').write('{"hidden_size": 16}')
    refuses(run('drope.py', f'--run={out}'), 'config.json', 'not of one of our runs')

def test_divergence_memory_and_compile_stop_with_one_line(dataset, tmp_path):
    good = [*TINY, f'--data_dir={dataset}', '--eval_interval=5']
    args = {'a': ('--max_iters=40', '--muon_lr=1e30'), 'b': ('--max_iters=4', '--mlp_hidden=2000000000')}
    refuses(run('train.py', *good, *args['a'], f'--run={tmp_path}/a'), 'loss is', 'step', '--muon_lr')
    refuses(run('train.py', *good, *args['b'], f'--run={tmp_path}/b'), 'out of memory', '--grad_accum')
    line = command('train.py', *good, '--max_iters=4', '--compile=True', f'--run={tmp_path}/c')
    done = spawn(line, env={'CXX': '/nonexistent', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')})
    refuses(done, 'torch.compile failed', '--compile=False')

def test_no_file_is_wide():
    for path in glob.glob(os.path.join(HERE, '*.py')):
        assert max(map(len, open(path).read().splitlines())) <= 120, path
