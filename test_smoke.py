"""The real scripts, tiny, as a person would type them; and what they say to bad input."""
import glob
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import run_experiment
import shards
from configurator import SCRIPTS, block, configure
from compare import (base, effects, forgetting, matched, max_t, orderedness, recovery, recovery_effects, sign_flip_p,
                     smallest_effect, t_interval, verdict)
from run_experiment import publish_results, publish_run
from test_train import HERE, TINY, dataset, drawn_again, run         # noqa: F401 (dataset is a fixture)

EXPERIMENT = """
data_dir, out_dir = 'data/tiny', 'out/tiny'
arms = ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_shuffled_pure', 'gqa_topic_ordered')
chain, beta, n_groups, repeats = 'group', 2.0, 4, False
n_topics, vocab_size, block_size, min_segment_len = 3, 16, 48, 9
train_rows, val_rows = 60, 40
n_layer, n_embd, n_head, head_dim, mlp_hidden = 2, 16, 2, 8, 24
batch_size, max_iters, eval_interval = 4, 12, 6
recal_iters = (0.5, 2)
null_draws, analysis_rows, lens_rows = 20, 24, 16
"""

@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A copy of the scripts, as a checkout, with one experiment run in it."""
    here = str(tmp_path_factory.mktemp('checkout'))
    for path in glob.glob(os.path.join(HERE, '*.py')):
        shutil.copy(path, here)
    open(os.path.join(here, 'tiny.py'), 'w').write(EXPERIMENT)
    done = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--publish=True', cwd=here)
    assert done.returncode == 0, done.stderr
    return here, done.stdout

def load(*path):
    return json.load(open(os.path.join(*path)), parse_constant=lambda s: pytest.fail(f'{s} in {path}'))

# -----------------------------------------------------------------------------
# an experiment, end to end

def test_experiment(workspace):
    here, printed = workspace
    summary = load(here, 'out/tiny/summary.json')
    assert len(summary['runs']) == 5 * 2 * (1 + 2 * 2)          # arms x seeds x (rope + {drope, kept} x two lengths)
    assert {r['condition'] for r in summary['runs']} == {
        f'{arm}_{kind}' for arm in ('mha_shuffled', 'mha_topic_ordered', 'mha_topic_c4', 'mha_shuffled_pure',
                                    'gqa_topic_ordered') for kind in ('rope', 'drope', 'kept')}
    reference = summary['references']
    assert reference['oracle'] < reference['filter'] < reference['bigram'] < reference['uniform']
    assert all(len(r['probe']) == 3 and 0 < r['within'] < 1 and r['entropy'] > 0 for r in summary['runs'])
    analysis = load(here, 'out/tiny/gqa_topic_ordered_drope/seed1/analysis.json')
    assert analysis['causal'] and analysis['recal_steps'] == 6 and len(analysis['heads']['score_p'][1]) == 2
    lens = load(here, 'out/tiny/gqa_topic_ordered_drope/seed1/lens.json')
    assert lens['settings']['lens_rows'] == 16 and len(lens['within']['silu']['projection']['chance']) == 5
    assert load(here, 'results/tiny/gqa_topic_ordered_drope/seed1/lens.json')['within'] == lens['within']
    for name in ('loss', 'scores_p', 'maps', 'probe', 'distance', 'lens', 'strip', 'circuits', 'spectra', 'effects',
                 'matched', 'factors', 'ablation', 'forgetting', 'order', 'free'):
        assert os.path.getsize(f'{here}/out/tiny/figures/{name}.png') > 5000
    report = open(f'{here}/out/tiny/summary.md').read()
    assert 'mha_shuffled_rope' in report and 'figures/loss.png' in report and 'mha_shuffled_rope' in printed
    for part in ('The probe and its controls', 'Paired differences', 'At equal loss', 'Realised order'):
        assert f'## {part}\n' in report
    contrasts = {e['contrast'] for e in summary['effects']}
    named = ('topic_ordered', 'topic_c4', 'shuffled_pure')
    assert {f'mha {arm} - shuffled, drope - kept' for arm in named} <= contrasts
    assert 'MHA: the effect of topic order on P' in report and 'MHA: the effect of topic order on P' in printed
    assert {tuple(m['arms']) for m in summary['matched']} >= {('topic_ordered', 'shuffled'), ('topic_c4', 'shuffled')}

def test_recalibration_reads_mixed_rows_in_every_arm(workspace):
    here, _ = workspace
    config = lambda name: load(here, f'out/tiny/{name}/seed0/config.json')
    assert config('mha_shuffled_pure_rope')['max_segments'] == 1
    for kind in ('drope', 'kept'):
        pure, mixed = config(f'mha_shuffled_pure_{kind}'), config(f'mha_shuffled_{kind}')
        assert {k for k in pure if pure[k] != mixed[k]} == {'condition', 'parent'} and pure['max_segments'] == 5
    digests = [torch.load(f'{here}/out/tiny/{arm}_drope/seed0/ckpt.pt', weights_only=True)['rows']
               for arm in ('mha_shuffled', 'mha_topic_c4', 'mha_shuffled_pure')]
    assert len(set(digests)) == 1

@pytest.mark.parametrize('script', ['analyze.py', 'tensor_lens.py', 'drope.py'])
def test_another_dataset_in_its_place(workspace, script, tmp_path):
    """A run whose dataset was made again with other chains is not measured on those, and says so in one line."""
    here, kind = workspace[0], 'rope' if script == 'drope.py' else 'drope'
    shutil.copytree(f'{here}/data/tiny', tmp_path / 'data')
    shutil.copytree(f'{here}/out/tiny/mha_shuffled_{kind}/seed1', tmp_path / 'run')
    config = load(tmp_path, 'run/config.json') | {'data_dir': str(tmp_path / 'data')}
    json.dump(config, open(tmp_path / 'run/config.json', 'w'))
    meta = load(tmp_path, 'data/seed1/meta.json')
    json.dump(meta | {'beta': 1.5}, open(tmp_path / 'data/seed1/meta.json', 'w'))
    done = run(script, f'--run={tmp_path}/run', cwd=here)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'beta = 2.0, there 1.5' in done.stderr
    json.dump(meta, open(tmp_path / 'data/seed1/meta.json', 'w'))
    json.dump(config | {'eval_rows': 7}, open(tmp_path / 'run/config.json', 'w'))           # a run's own is no other
    if script != 'drope.py':
        open(tmp_path / 'run/log.jsonl', 'w').close()
        done = run(script, f'--run={tmp_path}/run', cwd=here)
        assert done.returncode == (script == 'analyze.py') and len(done.stderr.splitlines()) == (script == 'analyze.py')

def test_published_figures_can_be_drawn_again(workspace, tmp_path):
    """What is left out of published JSON is what no figure shows."""
    drawn, published = drawn_again(f'{workspace[0]}/results/tiny', tmp_path)
    assert {'maps.png', 'spectra.png', 'circuits.png', 'strip.png'} < set(drawn)
    assert drawn == published

def test_experiment_goes_on_where_it_stopped(workspace):
    here, _ = workspace
    before = load(here, 'out/tiny/summary.json')['runs']
    os.remove(f'{here}/out/tiny/mha_shuffled_rope/seed0/ckpt.pt')              # done all the same: its JSON is there
    shutil.rmtree(f'{here}/out/tiny/gqa_topic_ordered_kept')                   # done all the same: it is published
    os.remove(f'{here}/out/tiny/mha_shuffled_kept/seed1/lens.json')            # done all the same: older runs have none
    plan = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--dry_run=True', cwd=here)
    assert plan.returncode == 0 and 'to do' not in plan.stdout.split('\n', 1)[1] and '50 runs' in plan.stdout
    open(f'{here}/out/tiny/figures/words.png', 'w').close()                    # of an earlier report
    again = run('run_experiment.py', 'tiny.py', '--seeds=0,1', cwd=here)
    assert again.returncode == 0 and 'to do: 0 of 10' in again.stdout
    assert '4 runs are done and published in results/tiny' in again.stdout
    assert not os.path.exists(f'{here}/out/tiny/figures/words.png')
    other = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--max_iters=13', '--dry_run=True', cwd=here)
    assert other.returncode == 0 and 'other' in other.stdout and 'holds a run with another max_iters' in other.stdout
    assert load(here, 'out/tiny/summary.json')['runs'] == before
    shutil.rmtree(f'{here}/out/tiny/mha_shuffled_drope/seed0')
    shutil.rmtree(f'{here}/results')
    again = run('run_experiment.py', 'tiny.py', '--seeds=0,1', '--jobs=2', cwd=here)
    assert again.returncode == 0, again.stderr
    untimed = lambda runs: [{k: v for k, v in r.items() if k != 'seconds'} for r in runs]
    assert untimed(load(here, 'out/tiny/summary.json')['runs']) == untimed(before)     # the same seed, the same run

def test_a_run_is_published_with_its_lens_or_without(workspace, monkeypatch, tmp_path):
    folder, cfg = 'out/tiny/gqa_topic_ordered_rope/seed1', SimpleNamespace(out_dir='out/tiny')
    shutil.copytree(f'{workspace[0]}/{folder}', tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    publish_run(cfg, folder)
    lens, copy = load(folder, 'lens.json'), load(folder.replace('out', 'results'), 'lens.json')
    assert copy == lens | {'strip': None} and lens['strip']['tokens']          # strips of seed 0 alone are kept
    os.remove(f'{folder}/lens.json')                                           # as after a light analysis
    shutil.rmtree('results')
    publish_run(cfg, folder)
    assert sorted(os.listdir(folder.replace('out', 'results'))) == ['analysis.json', 'config.json', 'log.jsonl']
    for name in ('notes.md', 'old.json'):
        open(f'results/tiny/{name}', 'w').close()
    publish_results(cfg)
    assert sorted(os.listdir('results/tiny')) == ['gqa_topic_ordered_rope', 'notes.md']        # written by hand: stays

def test_two_experiments_side_by_side(workspace):
    here, _ = workspace
    shutil.copytree(f'{here}/out/tiny', f'{here}/out/other')
    done = run('plot.py', 'out/tiny', 'out/other', cwd=here)
    assert done.returncode == 0 and os.path.exists(f'{here}/out/tiny/figures/compare_other.png'), done.stderr

def test_unmasked_columns(workspace):
    here, _ = workspace
    done = run('analyze.py', '--run=out/tiny/mha_shuffled_rope/seed1', '--causal=False', cwd=here)
    assert done.returncode == 0, done.stderr
    assert load(here, 'out/tiny/mha_shuffled_rope/seed1/analysis_unmasked.json')['causal'] is False

# -----------------------------------------------------------------------------
# statistics

def test_interval_and_sign_flips():
    x = np.random.default_rng(0).normal(0.5, 1, 6)
    mean, low, high = t_interval(x)
    reference = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high)) and mean == pytest.approx(x.mean())
    reference = stats.permutation_test((x,), np.mean, permutation_type='samples', n_resamples=np.inf)
    assert sign_flip_p(x) == pytest.approx(reference.pvalue)
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64 and sign_flip_p([1]) is None
    assert t_interval([2.0]) == (2, None, None)

def test_smallest_effect():
    # six seeds must all agree in sign: Phi(d)^6 = 0.8, so d = 1.79
    assert smallest_effect(6) == pytest.approx(1.79, abs=0.06)
    assert smallest_effect(8) < 1.35 and smallest_effect(5) is None

def test_max_t():
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1, (6, 1))
    assert max_t(d)[0] == pytest.approx(sign_flip_p(d[:, 0]))              # one measure: nothing to adjust
    d = rng.normal(0, 1, (6, 5)) + np.array([3, 0, 0, 0, 0])
    p = max_t(d)
    assert all(a >= sign_flip_p(column) - 1e-12 for a, column in zip(p, d.T)) and p[0] == min(p)
    assert max_t(np.repeat(d[:, :1], 5, axis=1)) == pytest.approx([sign_flip_p(d[:, 0])] * 5)   # copies cost nothing
    rejected = [min(max_t(rng.normal(0, 1, (6, 6)))) <= 0.05 for _ in range(1000)]
    assert np.mean(rejected) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5      # the family keeps its level
    alike = lambda: 0.9 * rng.normal(0, 1, (6, 1)) + 0.44 * rng.normal(0, 1, (6, 6))
    rejected = [min(max_t(alike())) <= 0.05 for _ in range(1000)]          # and where its measures go together
    assert np.mean(rejected) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5
    shift = np.array([2.5, 2.5, 0, 0, 0, 0])                               # two of six measures, at 2.5 SD
    both = [max(max_t(rng.normal(0, 1, (6, 6)) + shift)[:2]) <= 0.05 for _ in range(300)]
    print('family-wise', np.mean(rejected), 'both found', np.mean(both))
    assert np.mean(both) > 0.5                                             # most of the time

def test_effects_are_paired_by_seed():
    runs = [{'condition': f'mha_{order}_{kind}', 'attention': 'mha', 'order': order, 'seed': seed, 'main': True,
             'probe': [0, 0, seed], 'score_p': value, 'val_loss': 1, 'within': 0, 'score_o': None, 'entropy': 0}
            for seed in (0, 1) for order, kind, value in (
                ('shuffled', 'drope', 10 * seed), ('shuffled', 'kept', 5 * seed),
                ('topic_ordered', 'drope', 10 * seed + 2 + seed), ('topic_ordered', 'kept', 5 * seed + 1))]
    found = {(e['measure'], e['contrast']): e for e in effects(runs)}
    primary = found['score_p', 'mha topic_ordered - shuffled, drope - kept']
    assert primary['differences'] == [1, 2] and primary['primary']
    assert primary['p'] == 0.5 and primary['p_adjusted'] is None
    assert found['score_p', 'mha topic_ordered - shuffled, drope']['differences'] == [2, 3]
    assert not any(m == 'score_o' for m, _ in found) and sum(e['primary'] for e in found.values()) == 1

def curve(order, seed, losses, probe):
    """Rows of an arm along its recalibration lengths: the middle probe is a function of the loss above the filter."""
    return [{'condition': f'mha_{order}_drope', 'attention': 'mha', 'order': order, 'stage': 'drope', 'seed': seed,
             'recal_steps': i + 1, 'val_loss': 5 + x, 'excess': x, 'score_p': 0.0, 'probe': [0, probe(x), 0]}
            for i, x in enumerate(losses)]

def test_equal_loss():
    """Arms that differ in loss alone do not differ at equal loss; a shift of the measure is found; no extrapolation."""
    line = lambda x: 0.9 - 0.5 * x
    rows = [r for seed in range(3) for r in (
        *curve('shuffled', seed, (0.5, 0.3, 0.1), line), *curve('topic_ordered', seed, (0.4, 0.2, 0.05), line),
        *curve('pseudo', seed, (0.4, 0.2), lambda x, seed=seed: line(x) + 0.1 + 0.01 * seed),
        *curve('topic_c4', seed, (0.9, 0.8), line))]              # never as good as the others: no comparison
    found = {(tuple(m['arms']), m['measure']): m for m in matched(rows)}
    same, shifted = found[('topic_ordered', 'shuffled'), 'probe'], found[('pseudo', 'shuffled'), 'probe']
    assert same['average'][0] == pytest.approx(0, abs=1e-9) and same['loss'][0] == pytest.approx(0.1)
    assert same['loss'][-1] == pytest.approx(0.4) and same['n'] == [3] * 25
    assert shifted['average'][0] == pytest.approx(0.11) and shifted['average'][1] > 0.08 and shifted['p'] == 0.25
    assert shifted['loss'][0] == pytest.approx(0.2)
    assert found[('topic_ordered', 'pseudo'), 'probe']['average'][0] == pytest.approx(-0.11)
    never = [m for (arms, _), m in found.items() if 'topic_c4' in arms]
    assert never and all(m['seeds'] == 0 and m['average'] == (None,) * 3 and m['loss'] == [] for m in never)
    assert not any(m['seeds'] == 0 for (arms, _), m in found.items() if 'topic_c4' not in arms)

def test_recovery_and_forgetting():
    rows = curve('shuffled', 0, (0.5, 0.1), lambda x: 0)
    logs = {('mha_shuffled_drope', 0, 2): [{'step': s, 'val_loss': 5 + x} for s, x in ((0, 1.1), (10, 0.6), (20, 0.1))]}
    (r,) = recovery(rows, logs, above=(2, 0.6, 0.35, 0.05))
    assert r['steps'][:3] == pytest.approx([0, 10, 15]) and r['steps'][3] is None
    twice = [{**r, 'condition': f'mha_{order}_drope', 'seed': seed, 'steps': [0, 10 * k * (seed + 1), None, None]}
             for order, k in (('shuffled', 1), ('topic_ordered', 2)) for seed in (0, 1)]
    (e,) = recovery_effects(twice)
    assert (e['mean'], e['n'], e['loss']) == (1.0, 2, 0.6) and e['contrast'] == 'mha topic_ordered - shuffled'
    record = lambda losses, since: [{'step': 500, 'val_loss_topics': losses, 'since': since, 'topics': [1, 1]}]
    logs = {('mha', 'shuffled', 0): record([1.0, 2.0], [0, 0]),
            ('mha', 'topic_ordered', 0): record([1.5, 2.1], [150, 0])}
    found = {f['condition']: f for f in forgetting(logs)}
    assert found['mha_topic_ordered_rope'] == {
        'condition': 'mha_topic_ordered_rope', 'since': [0, 100], 'excess': pytest.approx([0.1, 0.5]), 'n': [1, 1]}
    assert list(found) == ['mha_topic_ordered_rope']

def test_verdict_says_what_moved():
    """The primary contrast is a difference of differences: the verdict must not take the kept arm for DroPE."""
    def said(**shift):                                      # stage -> topic - shuffled of P and O, six seeds
        noise = np.random.default_rng(0)
        runs = [{'condition': f'mha_{order}_{kind}', 'attention': 'mha', 'order': order, 'stage': kind, 'seed': seed,
                 'main': True, 'probe': [0, 0, 0], 'val_loss': 1, 'within': 0, 'entropy': 0,
                 **{m: (order == 'topic_ordered') * shift.get(kind, 0) + noise.normal(0, 1e-3)
                    for m in ('score_p', 'score_o')}}
                for seed in range(6) for order in ('shuffled', 'topic_ordered') for kind in ('drope', 'kept')]
        return verdict({'effects': effects(runs)})[0]
    assert 'what differs is the kept arm' in said(kept=0.05)
    assert 'is there under DroPE; O agrees' in said(drope=0.05)
    both = said(drope=0.3, kept=0.3)
    assert 'not shown to differ' in both and 'Under DroPE alone: +0.29' in both
    assert 'not shown to differ' in said()

def test_base_and_common_seeds():
    assert [base(o) for o in ('shuffled', 'topic_c4', 'topic_ordered_pure', 'shuffled_pure')] == [
        None, 'shuffled', 'shuffled_pure', 'shuffled']
    runs = [{'condition': f'mha_{order}_drope', 'attention': 'mha', 'order': order, 'seed': seed, 'main': True,
             'probe': [0, 0, 0], 'val_loss': v + seed ** 2 * v, 'within': 0, 'entropy': 0, 'score_p': v, 'score_o': v}
            for seed in range(4) for order, v in (('shuffled', 0), ('topic_ordered', 1), ('pseudo', 2))
            if (order, seed) != ('pseudo', 3)]
    assert all(e['p_adjusted'] is not None for e in effects(runs))          # also where a seed is missing

def test_orderedness():
    bins = lambda *counts: [{'topics': list(c)} for c in counts]
    assert orderedness(bins((10, 0), (0, 10))) == pytest.approx(1)
    assert orderedness(bins((5, 5), (5, 5))) == pytest.approx(0)
    assert 0.1 < orderedness(bins((8, 2), (2, 8))) < 0.5 and orderedness([{'topics': [0, 0]}]) is None

# -----------------------------------------------------------------------------
# config

def test_files_before_flags_and_derived_values(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('_half = 128\nn_embd = 2 * _half\nconcentration = 7\nmax_iters = 5\nrecal_iters = 0.1\n')
    cfg = configure('train.py', ['--max_iters=9', str(path), '--compile=false', '--n_kv_head=none', '--run=123'])
    assert (cfg.n_embd, cfg.max_iters, cfg.compile, cfg.n_kv_head, cfg.run) == (256, 9, False, None, '123')
    assert configure('run_experiment.py', ['--arms=a,b', '--seeds=3']).arms == ('a', 'b')
    cfg = configure('drope.py', [str(path), '--recal_lr_scale=1'])
    assert cfg.recal_iters == (0.1,) and type(cfg.recal_lr_scale) is float and not hasattr(cfg, 'n_embd')

def test_scripts_share_their_defaults():
    """A key that two scripts have must mean the same in both: run_experiment.py resolves it once. The two makers of
    data may differ: each has its own where an experiment sets nothing."""
    seen, wiki = {}, block('prepare_wiki.py')
    for script in SCRIPTS:
        for key, default in block(script).items():
            if script != 'prepare_wiki.py':
                assert seen.setdefault(key, default) == default, f'{key} in {script}'
            assert wiki.get(key, default)[1] == default[1]              # of one type even so
    cfg = configure('run_experiment.py', ['--data_script=prepare_wiki.py', '--vocab_size=999'], stages=SCRIPTS)
    at = run_experiment.data_stage(cfg, 'mha_shuffled_pure', 3)
    assert (at.n_topics, at.vocab_size, at.max_segments, at.seed) == (wiki['n_topics'][0], 999, 1, 0)
    assert at.data_dir == 'data/wiki_pure' and at.work_dir == 'data/wiki_work'

def test_every_config_file_is_valid():
    for path in glob.glob(os.path.join(HERE, 'config', '*.py')):
        assert configure('run_experiment.py', [path], stages=SCRIPTS).overrides

def test_help_prints_the_block():
    done = run('train.py', '-h')
    assert done.returncode == 0 and '--max_iters=10000' in done.stdout and 'Muon: every 2D matrix' in done.stdout

# -----------------------------------------------------------------------------
# bad input: one line that names the culprit, a non-zero exit, nothing lost

def refuses(done, *words):
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    assert done.returncode != 0 and 'Traceback' not in done.stderr, done.stderr
    assert len(lines) == 1 and all(w in lines[0] for w in words), done.stderr

@pytest.mark.parametrize('source, words', (
    ('max_iter = 5', ("'max_iter'", "'max_iters'", 'c.py')),
    ('max_iters = "many"', ('max_iters', "'many'", 'int')),
    ('max_iters = 5 +', ('c.py, line 1',)),
    ('max_iters = nothing', ('c.py', 'nothing'))))
def test_bad_config_file(tmp_path, source, words):
    (tmp_path / 'c.py').write_text(source + '\n')
    refuses(run('train.py', str(tmp_path / 'c.py')), *words)

@pytest.mark.parametrize('args, words', (
    (['--max_iter=5'], ("'max_iter'", "'max_iters'")),
    (['--max_iters=many'], ('max_iters', "'many'", 'int')),
    (['--chain=group'], ("'chain'",)),                                    # a key of another script
    (['--max_iters'], ('--max_iters=value',)),
    (['--n_kv_head=0'], ('n_kv_head = 0',)),
    (['max_iters=5'], ('max_iters=5',)),
    (['config/nothing.py'], ('config/nothing.py',)),
    (['--data_dir=nowhere'], ('nowhere', 'data_synth.py')),
    (['--order=sorted'], ('sorted', 'pseudo')),
    (['--device=cuda'], ('cuda',)),
    (['--dtype=half'], ('half', 'bfloat16')),
    (['config/demo.py', '--data_dir=DATASET'], ('n_topics = 3', '4'))))
def test_bad_flags(args, words, dataset):
    args = [arg.replace('config/demo', HERE + '/config/demo').replace('DATASET', dataset) for arg in args]
    refuses(run('train.py', *args), *words)

@pytest.mark.parametrize('args, words', (
    (['--seed=3'], ('seed = 3', 'seeds')),
    (['--arms=mha_sorted'], ('mha_sorted', 'topic_ordered')),
    (['--arms=3'], ('arms = 3', 'str')),
    (['--seeds=a'], ('seeds', 'int')),
    (['--recal_iters=0'], ('recal_iters',)),
    (['--null_draws=0'], ('null_draws = 0',))))
def test_bad_experiments(args, words):
    refuses(run('run_experiment.py', *args), *words)

def test_bad_runs(dataset, tmp_path):
    good, out = [*TINY, f'--data_dir={dataset}', '--max_iters=4'], str(tmp_path / 'out')
    refuses(run('train.py', *good, '--n_kv_head=3', f'--run={out}'), 'n_head = 2', 'n_kv_head = 3')
    refuses(run('train.py', *good, '--batch_size=6', '--grad_accum=4', f'--run={out}'), 'batch_size = 6')
    (tmp_path / 'file').write_text('')
    refuses(run('train.py', *good, f'--run={tmp_path}/file/run'), 'file/run', 'cannot write')
    refuses(run('drope.py'), '--run=')
    refuses(run('drope.py', f'--run={tmp_path}/none'), 'none', 'no run here')
    refuses(run('analyze.py', f'--run={tmp_path}/none'), 'none', 'no run here')
    refuses(run('plot.py', f'{tmp_path}/none'), 'none')
    assert run('train.py', *good, f'--run={out}').returncode == 0
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

def test_rows_of_one_topic(tmp_path):
    """Labels that never change inside a row leave P and O undefined: null in JSON, a dash on the screen."""
    rng = np.random.default_rng(0)
    tokens, topics = rng.integers(0, 20, (40, 33)), np.repeat(rng.integers(0, 3, (40, 1)), 33, axis=1)
    shards.write(f'{tmp_path}/data', dict(train=tokens, train_topics=topics, val=tokens, val_topics=topics),
                 dict(vocab_size=20, block_size=32, n_topics=3))
    run('train.py', *TINY, f'--data_dir={tmp_path}/data', '--max_iters=4', f'--run={tmp_path}/run')
    done = run('analyze.py', f'--run={tmp_path}/run')
    assert done.returncode == 0 and 'P —, O —' in done.stdout, done.stdout + done.stderr
    assert load(f'{tmp_path}/run/analysis.json')['references']['filter'] is None

def test_divergence_memory_and_compile_stop_with_one_line(dataset, tmp_path):
    good = [*TINY, f'--data_dir={dataset}', '--eval_interval=5']
    done = run('train.py', *good, '--max_iters=40', '--muon_lr=1e30', f'--run={tmp_path}/a')
    refuses(done, 'loss is', 'step', '--muon_lr')
    done = run('train.py', *good, '--max_iters=4', '--mlp_hidden=400000000000', f'--run={tmp_path}/b')
    refuses(done, 'out of memory', '--grad_accum')
    compiler = {'CXX': '/nonexistent', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    done = run('train.py', *good, '--max_iters=4', '--compile=True', f'--run={tmp_path}/c', env=compiler)
    refuses(done, 'torch.compile failed', '--compile=False')

def test_no_file_is_wide():
    for path in glob.glob(os.path.join(HERE, '*.py')):
        assert max(map(len, open(path).read().splitlines())) <= 120, path
