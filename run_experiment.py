"""
A whole experiment: data, training, dropping, analysis, figures and statistics, for every arm and seed.

    python run_experiment.py config/demo.py
    python run_experiment.py config/structured.py --seeds=0,1,2 --publish=True
    python run_experiment.py config/run1.py --dry_run=True        # the plan, the number of runs, the disk it takes

What is done is skipped: a run is done when its analysis.json is there with the same settings, in out_dir or published
under results/, even where its checkpoint was deleted. Stop it at any time; the same command goes on. Writes summary.json,
summary.md and figures/ into out_dir; --publish copies what figures and tables are made from to results/<experiment>/.
"""
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats

import analyze
import data_synth
import drope
import plot
import shards
import train
from configurator import SCRIPTS, block, configure
from model import build

# -----------------------------------------------------------------------------
# config

arms = ('mha_shuffled', 'mha_topic_ordered')    # {mha,gqa}_{shuffled,topic_ordered,topic_c<cycles>,pseudo}[_cd<percent>][_nope]
seeds = (0,)                # one seed is one dataset and one initialisation, shared by all arms
jobs = 1                    # arms trained at a time, each in a process of its own, spread over the GPUs
dry_run = False             # print the plan and stop
publish = False             # copy JSON and figures to results/<experiment>/

# -----------------------------------------------------------------------------
# the plan

def arm_settings(arm, n_head):
    """The keys of train.py that an arm's name stands for: 'gqa_topic_c4_cd20' -> n_kv_head, order, cycles, cooldown, rope."""
    name = re.fullmatch(r'(mha|gqa)_(shuffled|topic_ordered|pseudo|(topic|pseudo)_c(\d+))(?:_cd(\d+))?(_nope)?', arm)
    if not name:
        raise SystemExit(f'arms: {arm!r} is not {{mha,gqa}}_{{shuffled,topic_ordered,topic_c<cycles>,pseudo}}[_cd<percent>][_nope]')
    attention, order, cycled, cycles, cooldown, nope = name.groups()
    if attention == 'gqa' and n_head % 2:
        raise SystemExit(f'arms: {arm!r} shares each key-value head between two queries, but n_head = {n_head} is odd')
    return {'n_kv_head': n_head if attention == 'mha' else n_head // 2, 'order': cycled or order.removesuffix('_ordered'),
            'cycles': int(cycles or 1), 'cooldown': int(cooldown or 0) / 100, 'rope': not nope}

def stage(cfg, script, **changes):
    """The config of one stage, from that of the experiment."""
    return SimpleNamespace(**{k: getattr(cfg, k) for k in block(script)} | changes)

def train_stage(cfg, arm, seed):
    return stage(cfg, 'train.py', seed=seed, **arm_settings(arm, cfg.n_head))

def arm_runs(cfg, arm, seed):
    """Every run of an arm and seed in the order they are made: [(folder, config, recalibration length or None), ...]."""
    c = train.resolve(train_stage(cfg, arm, seed), data_synth.parameters(stage(cfg, 'data_synth.py', seed=seed)))
    folder = os.path.join(cfg.out_dir, c['condition'], f'seed{seed}')
    runs = [(folder, c, None)]
    if c['rope']:
        for length, keep in itertools.product(cfg.recal_iters, (False, True)):
            steps = drope.recal_steps(length, c['max_iters'])
            runs.append((drope.recal_folder(folder, length, cfg.recal_iters[0], c['max_iters'], keep),
                         drope.recal_config(c, folder, steps, keep, cfg.recal_lr_scale), length))
    return runs

def is_done(folder, c):
    """Whether a run of these settings is analysed. One that was published is copied back first."""
    published = os.path.join('results', os.path.relpath(folder, 'out'))
    for place in (folder, published):
        if not os.path.exists(os.path.join(place, 'analysis.json')):
            continue
        there = json.load(open(os.path.join(place, 'config.json')))
        if not train.differences(c, there):
            if place == published:
                os.makedirs(folder, exist_ok=True)
                for name in ('config.json', 'log.jsonl', 'analysis.json'):
                    shutil.copy(os.path.join(place, name), os.path.join(folder, name))
            return True
    return False

def disk_gib(c):
    """What a run leaves on disk: the weights, Muon's momentum and AdamW's two moments, in fp32."""
    with torch.device('meta'):
        model = build(c)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and '.layers.' in n)
    return 4 * (2 * matrices + 3 * (sum(p.numel() for p in model.parameters()) - matrices)) / 2**30

# -----------------------------------------------------------------------------
# the work

def run_arm(cfg, arm, seed, device=''):
    """Train an arm of one seed, drop and keep RoPE, analyse each; what is done is skipped. Returns the arm and seed."""
    cfg = SimpleNamespace(**vars(cfg) | {'device': device or cfg.device})
    todo = [r for r in arm_runs(cfg, arm, seed) if not is_done(*r[:2])]
    if not todo:
        return arm, seed
    parent = arm_runs(cfg, arm, seed)[0][0]
    train.main(train_stage(cfg, arm, seed))                 # the weights that the others start from
    for folder, c, length in todo:
        if length is not None:
            drope.recalibrate(stage(cfg, 'drope.py', run=parent, keep_rope=c['keep_rope']), length)
        analyze.main(stage(cfg, 'analyze.py', run=folder))
    return arm, seed

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
    """Exact two-sided p of a paired difference: the share of sign flips whose mean is at least as far from 0. None if n=1."""
    if len(d) < 2:
        return None
    means = np.abs(sign_flips(len(d)) @ np.asarray(d)) / len(d)
    return float((means >= abs(np.mean(d)) - 1e-12).mean())

def max_t(d):
    """
    Step-down max-|T| p-values [m] of m measures on n seeds, d [n, m]: a seed flips all its measures together, so their
    correlation is kept (Westfall & Young 1993, algorithm 4.1; Romano & Wolf 2005). None if n = 1.
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

MEASURES = ('score_p', 'val_loss', 'within', 'score_o', 'entropy', 'probe')

def effects(runs, n_layer):
    """
    Paired differences between arms at the main recalibration length: per stage (rope, kept, drope, nope) and, as
    'drope - kept', their difference. Primary: score_p, topic_ordered - shuffled, drope - kept. Its p stands alone; all the others of
    one attention type are adjusted together (p_adjusted).
    """
    value = {}
    for r in runs:
        for m in MEASURES:
            v = r['probe'][n_layer // 2] if m == 'probe' else r[m]
            if r['main'] and v is not None:
                value[m, r['condition'], r['seed']] = v
    orders = {}
    for r in runs:
        attention, rest = r['condition'].split('_', 1)
        order = rest.rsplit('_', 1)[0]
        orders.setdefault(attention, {}).setdefault(order, None)
    result = []
    for attention, names in orders.items():
        pairs = [(a, 'shuffled') for a in names if a != 'shuffled' and 'shuffled' in names]
        pairs += [(a, b) for a in names for b in names if b == a.replace('topic_ordered', 'pseudo').replace('topic_', 'pseudo_') != a]
        family = []
        for (a, b), where, m in itertools.product(pairs, ('drope - kept', 'drope', 'kept', 'rope', 'nope'), MEASURES):
            terms = [(sign * s, f'{attention}_{arm}_{kind}') for s, kind in zip((1, -1), where.split(' - '))
                     for sign, arm in ((1, a), (-1, b))]
            shared = sorted(set.intersection(*({seed for mm, k, seed in value if (mm, k) == (m, name)} for _, name in terms)))
            if not shared:
                continue
            d = [sum(sign * value[m, name, seed] for sign, name in terms) for seed in shared]
            mean, low, high = t_interval(d)
            primary = m == 'score_p' and (a, b) == ('topic_ordered', 'shuffled') and where == 'drope - kept'
            result.append({'measure': m, 'contrast': f'{attention} {a} - {b}, {where}', 'mean': mean, 'low': low, 'high': high,
                           'n': len(d), 'p': sign_flip_p(d), 'p_adjusted': None, 'primary': primary, 'differences': d})
            if not primary:
                family.append(result[-1])
        complete = [e for e in family if e['n'] == max(f['n'] for f in family)]
        for e, p in zip(complete, max_t(np.array([e['differences'] for e in complete]).T) if complete else ()):
            e['p_adjusted'] = p
    return result

# -----------------------------------------------------------------------------
# the summary

def summarise(cfg, plan):
    """Write summary.json and summary.md of what is analysed in out_dir; returns the summary."""
    runs, references, analysed = [], [], None
    for arm, seed in plan:
        for folder, c, _ in arm_runs(cfg, arm, seed):
            if not is_done(folder, c):
                continue
            a = analysed = json.load(open(os.path.join(folder, 'analysis.json')))
            references.append(a['references'])
            runs.append({'condition': a['condition'], 'seed': seed, 'recal_steps': a['recal_steps'], 'keep_rope': a['keep_rope'],
                         'main': 'recal_' not in os.path.basename(folder), 'val_loss': a['val_loss'],
                         **{k: a['mean'][k] for k in ('within', 'within_all', 'score_p', 'score_o', 'entropy', 'sink', 'self')},
                         'within_uniform': a['uniform']['within'], 'within_all_uniform': a['uniform']['within_all'],
                         'entropy_uniform': a['uniform']['entropy'], 'probe': a['probe']['accuracy'],
                         'probe_majority': a['probe']['majority'], 'probe_token': a['probe']['token'],
                         'probe_ceiling': a['probe']['ceiling'], 'seconds': a['train_seconds']})
    if not runs:
        raise SystemExit(f'{cfg.out_dir}: nothing is analysed yet')
    mean = lambda key: (lambda v: float(np.mean(v)) if v else None)([r[key] for r in references if r[key] is not None])
    summary = {'experiment': os.path.basename(cfg.out_dir), 'references': {k: mean(k) for k in references[0]},
               'device': analysed['device'], 'versions': analysed['versions'], 'n_layer': cfg.n_layer,
               'runs': runs, 'effects': effects(runs, cfg.n_layer)}
    shards.write_json(os.path.join(cfg.out_dir, 'summary.json'), summary)
    return summary

def number(values, form):
    """'mean' of one value, 'mean ± half-width' of several; an em dash where a run has none."""
    values = [v for v in values if v is not None]
    if not values:
        return '—'
    mean, low, _ = t_interval(values)
    return form.format(mean) + ('' if low is None else ' ± ' + form.format(mean - low).lstrip('+'))

def table(summary):
    """The log's table, with what chance gives beside each share, as Markdown lines."""
    ref, middle = summary['references'], summary['n_layer'] // 2
    first = summary['runs'][0]
    lines = [f'| Condition | Val loss | {"Gap closed | " if ref["filter"] else ""}Within (uniform {first["within_uniform"]:.1%}) '
             f'| Within, all (uniform {first["within_all_uniform"]:.1%}) | Entropy (uniform {first["entropy_uniform"]:.2f}) '
             f'| Probe@L{middle} | P | O | n |']
    lines.append('|' + '---|' * (lines[0].count('|') - 1))
    groups = {}
    for r in summary['runs']:
        name = r['condition'] + ('' if r['main'] else f', {r["recal_steps"]} steps')
        groups.setdefault(name, []).append(r)
    for name, rs in groups.items():
        cells = [number([r['val_loss'] for r in rs], '{:.4f}')]
        if ref['filter']:
            cells.append(number([(ref['bigram'] - r['val_loss']) / (ref['bigram'] - ref['filter']) for r in rs], '{:.1%}'))
        cells += [number([r[k] for r in rs], form) for k, form in
                  (('within', '{:.1%}'), ('within_all', '{:.1%}'), ('entropy', '{:.2f}'))]
        cells += [number([r['probe'][middle] for r in rs], '{:.1%}')]
        cells += [number([r[k] for r in rs], '{:+.3f}') for k in ('score_p', 'score_o')]
        lines.append(f'| {name} | ' + ' | '.join(cells) + f' | {len(rs)} |')
    return lines

def effects_table(summary):
    form = lambda v, f='{:+.4f}': '—' if v is None else f.format(v)
    lines = ['| Measure | Contrast | Difference | 95% interval | n | p (sign flip) | p (max-T) |', '|---|---|---|---|---|---|---|']
    for e in sorted(summary['effects'], key=lambda e: not e['primary']):
        interval = 'n=1: no interval' if e['low'] is None else f'[{e["low"]:+.4f}, {e["high"]:+.4f}]'
        lines.append(f'| {"**primary** " if e["primary"] else ""}{e["measure"]} | {e["contrast"]} | {form(e["mean"])} | {interval} '
                     f'| {e["n"]} | {form(e["p"], "{:.3f}")} | {form(e["p_adjusted"], "{:.3f}")} |')
    return lines

def write_report(cfg, summary, figures):
    """summary.md: the table, what it is measured against, the paired differences, the figures."""
    ref, first = summary['references'], summary['runs'][0]
    n = len({r['seed'] for r in summary['runs']})
    nats = ', '.join(f'{k} {v:.4f}' for k, v in ref.items() if v is not None)
    lines = [f'# {summary["experiment"]}', '',
             f'{summary["device"]}, ' + ', '.join(f'{k} {v}' for k, v in summary['versions'].items()) + f'. {n} seed{"s" * (n > 1)}'
             + ('; ± is the half-width of a 95% t-interval over seeds.' if n > 1 else ': no interval can be given.'), '',
             *table(summary), '',
             f'Reference losses in nats: {nats}. Gap closed: the way from the topic-blind bigram to the Bayes filter.' if nats else '',
             f'Probe references at the same tokens: majority {first["probe_majority"]:.1%}, token identity {first["probe_token"]:.1%}'
             + (f', Bayes ceiling {first["probe_ceiling"]:.1%}' if first['probe_ceiling'] else '') + ' (first run).',
             'Within: attention on keys of the query\'s topic, over queries with a choice; it is high for any local head. P: topic '
             'or contiguity, 0 for a head that knows positions alone. O: topic without contiguity, from other segments.', '',
             '## Paired differences', '',
             f'Primary, named beforehand: P, (topic - shuffled) under DroPE minus the same under kept RoPE. With {n} seed{"s" * (n > 1)} '
             + (f'the smallest p possible is {2 / 2 ** n:.3g}.' if n > 1 else 'there is no test.'), '',
             *effects_table(summary), '', '## Figures', '']
    lines += [f'![{os.path.basename(f)}]({os.path.relpath(f, cfg.out_dir)})\n' for f in figures]
    shards.write_text(os.path.join(cfg.out_dir, 'summary.md'), '\n'.join(lines) + '\n')

def publish_results(cfg):
    """Copy out_dir's JSON and figures to results/<experiment>/: curves thinned to 200 points, maps of the first seed alone."""
    target = os.path.join('results', os.path.basename(cfg.out_dir))
    temporary = target + '.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    for folder, _, names in os.walk(cfg.out_dir):
        there = os.path.join(temporary, os.path.relpath(folder, cfg.out_dir))
        for name in names:
            source, copy = os.path.join(folder, name), os.path.join(there, name)
            if not name.endswith(('.json', '.jsonl', '.md', '.png')):
                continue
            os.makedirs(there, exist_ok=True)
            if name == 'log.jsonl':
                lines = open(source).read().splitlines()
                step = -(-len(lines) // 200)
                kept = [line for i, line in enumerate(lines) if i % step == 0 or '"val_loss": null' not in line]
                shards.write_text(copy, '\n'.join(kept) + '\n')
            elif name == 'analysis.json':
                a = json.load(open(source))
                if a['seed'] != cfg.seeds[0]:
                    a['maps'] = []
                shards.write_text(copy, json.dumps(a, allow_nan=False) + '\n')
            else:
                shutil.copy(source, copy)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    size = sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(target) for n in names)
    print(f'published {target}, {size / 1e6:.1f} MB')

# -----------------------------------------------------------------------------

def clock_text(seconds):
    return f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'

def main(cfg):
    plan = list(itertools.product(cfg.arms, cfg.seeds))
    runs = {pair: arm_runs(cfg, *pair) for pair in plan}
    todo = [pair for pair in plan if not all(is_done(*run[:2]) for run in runs[pair])]
    steps = lambda pair: sum(c['max_iters'] for _, c, _ in runs[pair])
    print(f'{cfg.out_dir}: {len(cfg.arms)} arms x {len(cfg.seeds)} seeds, {sum(map(len, runs.values()))} runs, '
          f'{sum(map(steps, plan)):,} steps; to do: {len(todo)} of {len(plan)} arms')
    if cfg.dry_run:
        for pair in plan:
            for folder, c, _ in runs[pair]:
                print(f'  {"done " if is_done(folder, c) else "to do"}  {c["max_iters"]:>7,} steps  {folder}')
        rows = (cfg.train_rows + cfg.val_rows) * (cfg.block_size + 1) * 3 + cfg.val_rows * (cfg.block_size + 1) * cfg.n_topics * 2
        disk = sum(disk_gib(c) for pair in plan for _, c, _ in runs[pair])
        print(f'disk: {disk:.2f} GiB of checkpoints, {len(cfg.seeds) * rows / 2**30:.2f} GiB of data')
        return
    clock, finished = time.time(), 0
    if todo:
        for seed in sorted({seed for _, seed in todo}):
            data_synth.main(stage(cfg, 'data_synth.py', seed=seed))
    total = sum(map(steps, todo))
    def report(pair):
        nonlocal finished
        finished += steps(pair)
        left = (time.time() - clock) * (total / finished - 1)
        print(f'[{clock_text(time.time() - clock)}] {pair[0]} seed {pair[1]} done; about {clock_text(left)} left', flush=True)
    if cfg.jobs > 1 and len(todo) > 1:
        gpus = torch.cuda.device_count()
        with ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context('spawn')) as pool:
            futures = [pool.submit(run_arm, cfg, *pair, f'cuda:{i % gpus}' if gpus else '') for i, pair in enumerate(todo)]
            for future in as_completed(futures):
                report(future.result())
    else:
        for pair in todo:
            report(run_arm(cfg, *pair))
    summary = summarise(cfg, plan)
    figures = plot.main(SimpleNamespace(**{k: getattr(cfg, k) for k in block('plot.py')}, paths=[cfg.out_dir]))
    write_report(cfg, summary, figures)
    print('\n'.join(table(summary)))
    print('\n'.join(effects_table(summary)[:2] + [line for line in effects_table(summary)[2:] if 'drope' in line or 'primary' in line]))
    print(f'report and figures: {cfg.out_dir}/summary.md, {cfg.out_dir}/figures/')
    if cfg.publish:
        publish_results(cfg)

if __name__ == '__main__':
    main(configure(__file__, stages=SCRIPTS[:-1]))
