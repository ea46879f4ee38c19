"""
A whole experiment: data, training, dropping, analysis, figures and statistics, for every arm and seed.

    python run_experiment.py config/demo.py
    python run_experiment.py config/structured.py --seeds=0,1,2 --publish=True
    python run_experiment.py config/run1.py --dry_run=True        # the plan, the number of runs, the disk it takes

What is done is skipped: a run is done when its analysis.json is there with the same settings, in out_dir or published
under results/, even where its checkpoint was deleted. Stop it at any time; the same command goes on. Writes
summary.json, summary.md and figures/ into out_dir; --publish copies what they are made from to results/<experiment>/.
"""
import functools
import glob
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import analyze
import data_synth
import drope
import plot
import shards
import train
from configurator import SCRIPTS, block, configure
from model import build, read_config

# -----------------------------------------------------------------------------
# config

arms = ('mha_shuffled', 'mha_topic_ordered')    # ARM_NAMES says what can be put here
seeds = (0,)                # one seed is one dataset and one initialisation, shared by all arms
jobs = 1                    # arms trained at a time, in as many processes, spread over the GPUs
dry_run = False             # print the plan and stop
publish = False             # copy JSON and figures to results/<experiment>/

# -----------------------------------------------------------------------------
# the plan

ARM_NAMES = '{mha,gqa}_{shuffled,topic_ordered,topic_c<cycles>,pseudo,pseudo_c<cycles>}[_cd<percent>][_nope]'

def arm_settings(arm, n_head):
    """What an arm's name stands for: 'gqa_topic_c4_cd20' -> {n_kv_head, order, cycles, cooldown, rope} of train.py."""
    name = re.fullmatch(r'(mha|gqa)_(shuffled|topic_ordered|pseudo|(topic|pseudo)_c(\d+))(?:_cd(\d+))?(_nope)?', arm)
    if not name:
        raise SystemExit(f'arms: {arm!r} is not of the form {ARM_NAMES}')
    attention, order, cycled, cycles, cooldown, nope = name.groups()
    if attention == 'gqa' and n_head % 2:
        raise SystemExit(f'arms: {arm!r} shares each key-value head between two queries, but n_head = {n_head} is odd')
    return {'n_kv_head': n_head if attention == 'mha' else n_head // 2, 'cycles': int(cycles or 1),
            'order': cycled or order.removesuffix('_ordered'), 'cooldown': int(cooldown or 0) / 100, 'rope': not nope}

def stage(cfg, script, **changes):
    """The config of one stage, from that of the experiment."""
    return SimpleNamespace(**{k: getattr(cfg, k) for k in block(script)} | changes)

def train_stage(cfg, arm, seed):
    return stage(cfg, 'train.py', seed=seed, **arm_settings(arm, cfg.n_head))

def arm_runs(cfg, arm, seed):
    """The runs of an arm and seed, in the order they are made: [(folder, config, recalibration length or None)]."""
    data = data_synth.parameters(stage(cfg, 'data_synth.py', seed=seed))
    c = train.resolve(train_stage(cfg, arm, seed), data)
    folder = os.path.join(cfg.out_dir, c['condition'], f'seed{seed}')
    runs = [(folder, c, None)]
    if c['rope']:
        for length, keep in itertools.product(cfg.recal_iters, (False, True)):
            steps = drope.recal_steps(length, c['max_iters'])
            runs.append((drope.recal_folder(folder, length, cfg.recal_iters[0], c['max_iters'], keep),
                         drope.recal_config(c, folder, steps, keep, cfg.recal_lr_scale), length))
    return runs

def published(cfg, folder=None):
    """Where an experiment, or one of its folders, is published."""
    place = os.path.join('results', os.path.basename(cfg.out_dir))
    return os.path.join(place, os.path.relpath(folder, cfg.out_dir)) if folder else place

def done_in(cfg, folder, c):
    """The folder that holds the analysis of this run: its own, or where it was published; None if it is to be done."""
    settings = {k: getattr(cfg, k) for k in analyze.SETTINGS}
    for place in (folder, published(cfg, folder)):
        path = os.path.join(place, 'analysis.json')
        if os.path.exists(path) and not train.differences(c, read_config(place)):
            if json.load(open(path)).get('settings') == settings:
                return place

def disk_gib(c):
    """What a run leaves on disk: the weights, Muon's momentum and AdamW's two moments, in fp32."""
    with torch.device('meta'):
        matrices, others = (sum(p.numel() for p in part) for part in train.split_parameters(build(c)))
    return 4 * (2 * matrices + 3 * others) / 2**30

# -----------------------------------------------------------------------------
# the work

def run_arm(cfg, arm, seed):
    """Train an arm of one seed, drop and keep RoPE, analyse each; what is done is skipped."""
    runs = arm_runs(cfg, arm, seed)
    todo = [run for run in runs if not done_in(cfg, *run[:2])]
    parent = runs[0][0]
    # the parent is trained, again if its checkpoint was deleted, where a run has still to start from it
    if any(run is runs[0] or not os.path.exists(os.path.join(run[0], 'ckpt.pt')) for run in todo):
        train.main(train_stage(cfg, arm, seed))
    for folder, c, length in todo:
        if length is not None:
            drope.recalibrate(stage(cfg, 'drope.py', run=parent, keep_rope=c['keep_rope']), length)
        analyze.main(stage(cfg, 'analyze.py', run=folder, causal=True))

def steps_made(folder):
    """How many steps of a run are done, from its log."""
    try:
        return json.loads(open(os.path.join(folder, 'log.jsonl')).read().splitlines()[-1]).get('step', 0)
    except (OSError, ValueError, IndexError):
        return 0

def take_arms(cfg, queue, threads):
    """One of several processes: takes arms from the queue until it is empty, and compiles once for all of them."""
    if threads:
        torch.set_num_threads(threads)
    for pair in iter(queue.get, None):
        run_arm(cfg, *pair)

def run_together(cfg, todo, runs):
    """The arms, cfg.jobs at a time, in as many processes: on the GPUs in turn, or sharing the cores."""
    gpus = torch.cuda.device_count() if cfg.device in ('', 'cuda') else 0
    jobs, context = min(cfg.jobs, len(todo)), multiprocessing.get_context('spawn')
    threads = None if gpus else max(1, os.cpu_count() // jobs)
    queue = context.Queue()
    for item in [*todo, *[None] * jobs]:
        queue.put(item)
    running = [context.Process(target=take_arms, args=(
        SimpleNamespace(**vars(cfg) | ({'device': f'cuda:{i % gpus}'} if gpus else {})), queue, threads))
        for i in range(jobs)]
    bar = tqdm(total=sum(c['max_iters'] for pair in todo for _, c, _ in runs[pair]), unit='step', disable=None)
    try:
        for process in running:
            process.start()
        while any(process.is_alive() for process in running):
            time.sleep(1)
            bar.update(sum(steps_made(folder) for pair in todo for folder, _, _ in runs[pair]) - bar.n)
            for process in running:
                if (process.exitcode or 0) < 0:             # else it has said itself what was wrong
                    print(f'{cfg.out_dir}: an arm was killed by signal {-process.exitcode}, perhaps for lack of '
                          'memory; try a lower --jobs', file=sys.stderr)
                if process.exitcode:
                    raise SystemExit(1)
    finally:
        for process in running:
            if process.pid:
                process.terminate()
        bar.close()

# -----------------------------------------------------------------------------
# statistics: the seed is the unit, arms are compared in pairs

def t_interval(x):
    """(mean, low, high): the 95% t-interval of a sample; low and high None for a sample of one."""
    mean = float(np.mean(x))
    if len(x) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half

def sign_flips(n):
    """All 2^n sign vectors [2^n, n]."""
    return np.array(list(itertools.product((1, -1), repeat=n)))

def sign_flip_p(d):
    """Exact two-sided p of a paired difference: the share of sign flips with a mean as far from 0. None if n = 1."""
    if len(d) < 2:
        return None
    means = np.abs(sign_flips(len(d)) @ np.asarray(d)) / len(d)
    return float((means >= abs(np.mean(d)) - 1e-12).mean())

def max_t(d):
    """
    Step-down max-|T| p-values [m] of m measures on n seeds, d [n, m]: a seed flips all its measures together, so
    their correlation is kept (Westfall & Young 1993, algorithm 4.1; Romano & Wolf 2005). None if n = 1.
    """
    d = np.asarray(d, float)
    n, m = d.shape
    if n < 2:
        return [None] * m
    flipped = sign_flips(n) @ d / n                                                        # [2^n, m] means
    sd = np.sqrt(np.maximum((d ** 2).mean(0) - flipped ** 2, 1e-30))                       # flips keep the squares
    T = np.abs(flipped) / sd
    order, p, running = np.argsort(-T[0]), np.empty(m), 0.0                                # the first row flips nothing
    for i, k in enumerate(order):
        top = T[:, order[i:]].max(1)
        running = max(running, float((top >= T[0, k] * (1 - 1e-9)).mean()))
        p[k] = running
    return p.tolist()

@functools.cache
def smallest_effect(n):
    """
    The paired difference, in SDs of it, that the sign-flip test at 5% finds in 80% of samples of n seeds (normal ones,
    simulated); None where no p can be that small: below 6 seeds.
    """
    if n < 6:
        return None
    if n > 10:
        return 2.8 / n ** 0.5                               # the normal test's, close enough by then
    noise, flips = np.random.default_rng(0).normal(0, 1, (4000, n)), sign_flips(n)
    for effect in np.arange(0.5, 3, 0.05):
        means = np.abs((noise + effect) @ flips.T)          # [4000, 2^n]; the first column flips nothing
        p = (means >= means[:, :1] - 1e-12).mean(1)
        if (p <= 0.05).mean() >= 0.8:
            return float(effect)

MEASURES = ('score_p', 'val_loss', 'within', 'score_o', 'entropy', 'probe')

def effects(runs, n_layer):
    """
    Paired differences between arms at the main recalibration length: at each stage (rope, kept, drope, nope) and, as
    'drope - kept', the difference of two. Primary: score_p, topic_ordered - shuffled, drope - kept; its p stands
    alone, all the others of an attention type are adjusted together (p_adjusted). smallest: what 80% power reaches.
    """
    value, names = {}, {}                                   # (measure, condition, seed) -> value; attention -> orders
    for r in runs:
        attention, order, _ = re.fullmatch(r'(mha|gqa)_(.+)_(\w+?)', r['condition']).groups()
        names.setdefault(attention, {})[order] = True
        for m in MEASURES:
            v = r['probe'][n_layer // 2] if m == 'probe' else r[m]
            if r['main'] and v is not None:
                value[m, r['condition'], r['seed']] = v
    result = []
    for attention, orders in names.items():
        pairs = [(a, 'shuffled') for a in orders if a != 'shuffled' and 'shuffled' in orders]
        for a in orders:
            b = a.replace('topic_ordered', 'pseudo').replace('topic_', 'pseudo_')
            pairs += [(a, b)] if a != b in orders else []
        family = []
        for (a, b), where, m in itertools.product(pairs, ('drope - kept', 'drope', 'kept', 'rope', 'nope'), MEASURES):
            terms = [(sign * flip, f'{attention}_{arm}_{kind}') for flip, kind in zip((1, -1), where.split(' - '))
                     for sign, arm in ((1, a), (-1, b))]
            having = [{seed for measure, name, seed in value if (measure, name) == (m, n)} for _, n in terms]
            shared = sorted(set.intersection(*having))
            if not shared:
                continue
            d = [sum(sign * value[m, name, seed] for sign, name in terms) for seed in shared]
            mean, low, high = t_interval(d)
            primary = (m, a, b, where) == ('score_p', 'topic_ordered', 'shuffled', 'drope - kept')
            result.append({'measure': m, 'contrast': f'{attention} {a} - {b}, {where}', 'mean': mean, 'low': low,
                           'high': high, 'n': len(d), 'p': sign_flip_p(d), 'p_adjusted': None, 'primary': primary,
                           'smallest': smallest_effect(len(d)) and smallest_effect(len(d)) * float(np.std(d, ddof=1)),
                           'seeds': shared, 'differences': d})
            family += [] if primary else [result[-1]]
        most = max((e['seeds'] for e in family), key=len, default=())
        family = [e for e in family if e['seeds'] == most]  # a flip must flip the same seeds in all of them
        if family:
            for e, p in zip(family, max_t(np.array([e['differences'] for e in family]).T)):
                e['p_adjusted'] = p
    return result

# -----------------------------------------------------------------------------
# the summary

def summarise(cfg, runs):
    """Write summary.json of runs that are all analysed, [(folder, config, length), ...]; returns it."""
    rows, references = [], []
    for folder, _, _ in runs:
        a = json.load(open(os.path.join(folder, 'analysis.json')))
        ref, mean, probe = a['references'], a['mean'], a['probe']
        references.append(ref)
        rows.append({
            **{k: a[k] for k in ('condition', 'seed', 'recal_steps', 'keep_rope')},
            'main': 'recal_' not in os.path.basename(folder), 'val_loss': a['val_loss'],
            # of the way from the topic-blind bigram to the Bayes filter, on this seed's own data
            'gap_closed': (ref['bigram'] - a['val_loss']) / (ref['bigram'] - ref['filter']) if ref['filter'] else None,
            **{k: mean[k] for k in ('within', 'within_all', 'score_p', 'score_o', 'entropy', 'sink', 'self')},
            **{f'{k}_uniform': v for k, v in a['uniform'].items()},
            'probe': probe['accuracy'], **{f'probe_{k}': probe[k] for k in ('majority', 'token', 'ceiling')},
            'seconds': a['train_seconds']})
    mean = lambda key: float(np.mean([r[key] for r in references])) if references[0][key] is not None else None
    summary = {'experiment': os.path.basename(cfg.out_dir), 'references': {k: mean(k) for k in references[0]},
               'device': a['device'], 'versions': a['versions'], 'n_layer': cfg.n_layer, 'runs': rows,
               'effects': effects(rows, cfg.n_layer)}
    shards.write_json(os.path.join(cfg.out_dir, 'summary.json'), summary)
    return summary

def number(values, form):
    """The mean of a sample and, of several, the half-width of its 95% interval; a dash where there is none."""
    if None in values:
        return '—'
    mean, low, _ = t_interval(values)
    return form.format(mean) + ('' if low is None else ' ± ' + form.format(mean - low).lstrip('+'))

def table(summary):
    """The log's table, with what uniform attention gives beside each column, as Markdown lines."""
    middle, groups = summary['n_layer'] // 2, {}
    for r in summary['runs']:
        groups.setdefault(r['condition'] + ('' if r['main'] else f', {r["recal_steps"]} steps'), []).append(r)
    uniform = lambda key, form: number([r[f'{key}_uniform'] for r in summary['runs'][:1]], form)
    columns = {'Val loss': ('val_loss', '{:.4f}'), 'Gap closed': ('gap_closed', '{:.1%}'),
               f'Within (uniform {uniform("within", "{:.1%}")})': ('within', '{:.1%}'),
               f'Within, all (uniform {uniform("within_all", "{:.1%}")})': ('within_all', '{:.1%}'),
               f'Entropy (uniform {uniform("entropy", "{:.2f}")})': ('entropy', '{:.2f}'),
               f'Probe@L{middle}': ('probe', '{:.1%}'), 'P': ('score_p', '{:+.3f}'), 'O': ('score_o', '{:+.3f}')}
    lines = [f'| Condition | {" | ".join(columns)} | n |', '|---' * (len(columns) + 2) + '|']
    for name, rs in groups.items():
        cells = [number([r['probe'][middle] if key == 'probe' else r[key] for r in rs], form)
                 for key, form in columns.values()]
        lines.append(f'| {name} | {" | ".join(cells)} | {len(rs)} |')
    return lines

def effects_table(effects):
    """Paired differences as Markdown lines, the primary ones first."""
    lines = ['| Measure | Contrast | Difference | 95% interval | 80% power from | n | p (sign flip) | p (max-T) |',
             '|---' * 8 + '|']
    for e in sorted(effects, key=lambda e: not e['primary']):
        interval = 'n=1: no interval' if e['low'] is None else f'[{e["low"]:+.4f}, {e["high"]:+.4f}]'
        lines.append(f'| {"**primary** " if e["primary"] else ""}{e["measure"]} | {e["contrast"]} | {e["mean"]:+.4f} '
                     f'| {interval} | {analyze.show(e["smallest"], ".4f")} | {e["n"]} '
                     f'| {analyze.show(e["p"], ".3f")} | {analyze.show(e["p_adjusted"], ".3f")} |')
    return lines

def verdict(summary):
    """One sentence for each attention type: what the primary measure allows to be said, and no more."""
    lines = []
    for e in (e for e in summary['effects'] if e['primary']):
        attention, n = e['contrast'].split()[0].upper(), e['n']
        if n == 1:
            lines.append(f'{attention}: one seed ({e["mean"]:+.4f}): no test, nothing can be concluded.')
            continue
        found = f'{e["mean"]:+.4f} [{e["low"]:+.4f}, {e["high"]:+.4f}], sign-flip p = {e["p"]:.3f}, n = {n}'
        if e['p'] <= 0.05:
            o = [o for o in summary['effects'] if (o['measure'], o['contrast']) == ('score_o', e['contrast'])]
            agrees = o and (o[0]['p_adjusted'] or 1) <= 0.05 and o[0]['mean'] * e['mean'] > 0
            lines.append(f'{attention}: topic order changes P under DroPE, beyond the kept control ({found}); ' + (
                'O agrees, so it may be called topic.' if agrees else 'O does not show it, so it may be contiguity.'))
        elif e['smallest'] is None:
            lines.append(f'{attention}: no effect of order on P under DroPE is shown ({found}); with {n} seeds no p '
                         'can be below 0.05, take six or more.')
        else:
            lines.append(f'{attention}: no effect of order on P under DroPE is shown ({found}); one of '
                         f'{e["smallest"]:.4f} would have been found in four of five such experiments.')
    return lines

def write_report(cfg, summary, figures):
    """summary.md: the table, what it is measured against, the paired differences, the figures."""
    ref, first = summary['references'], summary['runs'][0]
    n = len({r['seed'] for r in summary['runs']})
    nats = ', '.join(f'{k} {v:.4f}' for k, v in ref.items() if v is not None)
    ceiling = '' if first['probe_ceiling'] is None else f', Bayes ceiling {first["probe_ceiling"]:.1%}'
    lines = [
        f'# {summary["experiment"]}', '',
        f'{summary["device"]}, ' + ', '.join(f'{k} {v}' for k, v in summary['versions'].items()) + '. '
        + (f'{n} seeds; ±: half-width of the 95% t-interval over them.' if n > 1 else 'One seed: no interval.'), '',
        *table(summary), '',
        f'Reference losses in nats: {nats}. Gap closed: from the topic-blind bigram to the Bayes filter.', '',
        f'Probe references: majority {first["probe_majority"]:.1%}, token identity {first["probe_token"]:.1%}{ceiling} '
        f'(seed {first["seed"]}).', '',
        'Within: attention on keys of the query\'s topic, over queries with a choice; it is high for any local head. '
        'P: topic or contiguity, 0 for a head that knows positions alone. O: topic without contiguity, from other '
        'segments. Within, all: over all queries, as in the log.', '', '## Paired differences', '',
        'Primary, named beforehand: P, (topic - shuffled) under DroPE minus the same under kept RoPE. '
        + (f'The smallest p that {n} seeds can give is {2 / 2 ** n:.3g}.' if n > 1 else 'One seed allows no test.'), '',
        *(line + '\n' for line in verdict(summary)),
        *effects_table(summary['effects']), '',
        '80% power from: the smallest difference that this many seeds find four times in five, at the spread seen. '
        'Max-T: adjusted for all of the attention type\'s differences but the primary.', '', '## Figures', '',
        *(f'![{os.path.basename(f)}]({os.path.relpath(f, cfg.out_dir)})\n' for f in figures)]
    shards.write_text(os.path.join(cfg.out_dir, 'summary.md'), '\n'.join(lines) + '\n')

def publish_results(cfg):
    """Copy JSON and figures to results/<experiment>/, curves thinned to 200 points, maps of the first seed alone."""
    target = published(cfg)
    temporary, old = target + '.tmp', target + '.old'
    for folder in (temporary, old):                         # what a kill left behind
        shutil.rmtree(folder, ignore_errors=True)
    for folder, _, names in os.walk(cfg.out_dir):
        there = os.path.join(temporary, os.path.relpath(folder, cfg.out_dir))
        for name in names:
            source, copy = os.path.join(folder, name), os.path.join(there, name)
            if not name.endswith(('.json', '.jsonl', '.md', '.png')):
                continue
            os.makedirs(there, exist_ok=True)
            if name == 'log.jsonl':
                lines = open(source).read().splitlines()
                step = max(1, len(lines) // 200)            # a curve published before stays as it is
                kept = [line for i, line in enumerate(lines) if i % step == 0 or '"val_loss": null' not in line]
                shards.write_text(copy, '\n'.join(kept) + '\n')
            elif name == 'analysis.json':
                a = json.load(open(source))
                if a['seed'] != cfg.seeds[0]:
                    a['maps'] = []
                shards.write_text(copy, json.dumps(a, allow_nan=False) + '\n')
            else:
                shutil.copy(source, copy)
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(target) for n in names)
    print(f'published {target}, {size / 1e6:.1f} MB')

# -----------------------------------------------------------------------------

def clock_text(seconds):
    return f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'

def main(cfg):
    cfg.out_dir = os.path.normpath(cfg.out_dir)
    for key in ('run', 'seed', 'order', 'cycles', 'cooldown', 'rope', 'n_kv_head', 'keep_rope', 'causal'):
        if key in cfg.overrides:
            raise SystemExit(f'run_experiment.py: {key} = {cfg.overrides[key]!r} is not for an experiment, which takes '
                             f'arms and seeds (now {cfg.arms} and {cfg.seeds})')
    if cfg.jobs < 1 or min(cfg.seeds) < 0:
        raise SystemExit(f'run_experiment.py: jobs = {cfg.jobs} must be at least 1, seeds = {cfg.seeds} not negative')
    train.check(cfg)
    drope.check(cfg)
    analyze.check(cfg)
    plan = list(dict.fromkeys(itertools.product(cfg.arms, cfg.seeds)))
    runs = {pair: arm_runs(cfg, *pair) for pair in plan}
    everything = [run for pair in plan for run in runs[pair]]
    todo = [pair for pair in plan if not all(done_in(cfg, *run[:2]) for run in runs[pair])]
    steps = {pair: sum(c['max_iters'] for _, c, _ in runs[pair]) for pair in plan}
    print(f'{cfg.out_dir}: {len(cfg.arms)} arms x {len(cfg.seeds)} seeds, {len(everything)} runs, '
          f'{sum(steps.values()):,} steps; to do: {len(todo)} of {len(plan)} arms')
    if cfg.dry_run:
        for folder, c, _ in everything:
            place = done_in(cfg, folder, c)
            print(f'  {"done " if place else "to do"}  {c["max_iters"]:>7,} steps  {place or folder}')
        row = cfg.block_size + 1                            # 2 bytes a token, 1 a label, 2 a topic of the posterior
        data = len(cfg.seeds) * row * ((cfg.train_rows + cfg.val_rows) * 3 + cfg.val_rows * cfg.n_topics * 2)
        checkpoints = sum(disk_gib(c) for _, c, _ in everything)
        print(f'disk: {checkpoints:.2f} GiB of checkpoints, {data / 2**30:.2f} GiB of data')
        return

    # ---- what was published is read like the rest; what is published must not be lost
    for folder, c, _ in everything:
        place = done_in(cfg, folder, c)
        if place not in (None, folder):
            train.open_run(folder, c)                       # stops where a run with other settings is
            for name in (n for n in os.listdir(place) if n.endswith(('.json', '.jsonl'))):
                shutil.copy(os.path.join(place, name), os.path.join(folder, name))
    if cfg.publish:
        planned = {os.path.join(published(cfg, folder), 'analysis.json') for folder, _, _ in everything}
        others = set(glob.glob(os.path.join(published(cfg), '**', 'analysis.json'), recursive=True)) - planned
        if others:
            raise SystemExit(f'{min(others)}: published before and not in this plan, whose summary would leave it out; '
                             'add its arm and seed, or delete it')

    # ---- data, then every arm
    for seed in sorted({seed for _, seed in todo}):
        data_synth.main(stage(cfg, 'data_synth.py', seed=seed))
    if cfg.jobs > 1 and len(todo) > 1:
        run_together(cfg, todo, runs)
    else:
        clock, finished, total = time.time(), 0, sum(steps[pair] for pair in todo)
        for arm, seed in todo:
            run_arm(cfg, arm, seed)
            finished += steps[arm, seed]
            spent = time.time() - clock
            print(f'[{clock_text(spent)}] {arm} seed {seed} is done; about '
                  f'{clock_text(spent * (total / finished - 1))} left for the rest', flush=True)
    # ---- the report
    summary = summarise(cfg, everything)
    figures = plot.main(stage(cfg, 'plot.py', paths=[cfg.out_dir]))
    write_report(cfg, summary, figures)
    differences = [e for e in summary['effects'] if 'drope - kept' in e['contrast']]
    print('\n'.join([*table(summary), '', *(effects_table(differences) if differences else ()), '', *verdict(summary)]))
    print(f'report and figures: {cfg.out_dir}/summary.md, {cfg.out_dir}/figures/')
    if cfg.publish:
        publish_results(cfg)

if __name__ == '__main__':
    config = configure(__file__, stages=SCRIPTS[:-1])
    try:
        main(config)
    except KeyboardInterrupt:
        raise SystemExit(f'{config.out_dir}: stopped; the same command goes on') from None
