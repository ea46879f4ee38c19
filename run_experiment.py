"""
A whole experiment: data, training, dropping, analysis, figures and statistics, for every arm and seed.

    python run_experiment.py config/demo.py
    python run_experiment.py config/structured.py --seeds=0,1,2 --publish=True
    python run_experiment.py config/run1.py --dry_run=True        # the plan, the number of runs, the disk it takes

What is done is skipped: a run is done when its analysis.json is there with the same settings, in out_dir or published
under results/, even where its checkpoint was deleted. Stop it at any time; the same command goes on. Writes
summary.json, summary.md and figures/ into out_dir; --publish copies what they are made from to results/<experiment>/.
"""
import contextlib
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
from tqdm import tqdm

import analyze
import data_synth
import drope
import plot
import prepare_wiki
import shards
import tensor_lens
import train
from compare import effects, forgetting, matched, orderedness, recovery, recovery_effects, t_interval, verdict
from configurator import SCRIPTS, block, configure
from model import build, read_config

# -----------------------------------------------------------------------------
# config

arms = ('mha_shuffled', 'mha_topic_ordered')    # ARM_NAMES says what can be put here
seeds = (0,)                # one seed is one dataset and one initialisation, shared by all arms
full_at = (-1.0,)           # recalibration lengths analysed in full, others without null, controls, ablation; -1 = all
jobs = 1                    # arms trained at a time, in as many processes, spread over the GPUs
data_script = 'data_synth.py'   # what makes the data; or prepare_wiki.py, one dataset for all seeds
dry_run = False             # print the plan and stop
publish = False             # copy JSON, arm by arm, and figures to results/<experiment>/

# -----------------------------------------------------------------------------
# the plan

ARM_NAMES = '{mha,gqa}_{shuffled,topic_ordered,topic_c<cycles>,pseudo,pseudo_c<cycles>}[_cd<percent>][_pure][_nope]'

def arm_settings(arm, n_head):
    """What an arm's name stands for: 'gqa_topic_c4_cd20' -> {n_kv_head, order, cycles, cooldown, rope} of train.py."""
    name = re.fullmatch(r'(mha|gqa)_(shuffled|topic_ordered|pseudo|(topic|pseudo)_c(\d+))(?:_cd(\d+))?(_pure)?(_nope)?',
                        arm)
    if not name:
        raise SystemExit(f'arms: {arm!r} is not of the form {ARM_NAMES}')
    attention, order, cycled, cycles, cooldown, pure, nope = name.groups()
    if attention == 'gqa' and n_head % 2:
        raise SystemExit(f'arms: {arm!r} shares each key-value head between two queries, but n_head = {n_head} is odd')
    return {'n_kv_head': n_head if attention == 'mha' else n_head // 2, 'cycles': int(cycles or 1),
            'order': cycled or order.removesuffix('_ordered'), 'cooldown': int(cooldown or 0) / 100, 'rope': not nope}

def stage(cfg, script, **changes):
    """The config of one stage, from that of the experiment."""
    return SimpleNamespace(**{k: getattr(cfg, k) for k in block(script)} | changes)

def data_stage(cfg, arm, seed):
    """The dataset of an arm; _pure: training rows of one segment each, with the same chains and validation rows. There
    is one micro-language a seed, but one Wikipedia: there a seed is initialisation and order."""
    if cfg.data_script == 'data_synth.py':
        at = stage(cfg, 'data_synth.py', seed=seed)
    else:
        own = {k: default for k, (default, _) in block('prepare_wiki.py').items() if k not in cfg.overrides}
        at = stage(cfg, 'prepare_wiki.py', **{**own, 'seed': 0, 'device': cfg.device})
    if '_pure' in arm:
        at.data_dir, at.min_segments, at.max_segments = at.data_dir + '_pure', 1, 1
    return at

def mixed_stage(cfg, arm, seed):
    """The dataset that an arm is recalibrated on: rows of several segments, also for pure arms."""
    return data_stage(cfg, arm.replace('_pure', ''), seed)

def make_data(cfg, pairs):
    """Every dataset that these arms and seeds read, unless it is there."""
    main = data_synth.main if cfg.data_script == 'data_synth.py' else prepare_wiki.main
    stages = [of(cfg, *pair) for pair in pairs for of in (mixed_stage, data_stage)]
    for at in {(at.data_dir, at.seed): at for at in stages}.values():
        main(at)

def data_meta(cfg, at):
    """What the dataset of a data stage is, or will be: before it is made only its plan can be told."""
    if cfg.data_script == 'data_synth.py':
        return data_synth.parameters(at)
    there = os.path.exists(os.path.join(at.data_dir, 'meta.json'))
    return shards.read_meta(at.data_dir) if there else prepare_wiki.parameters(at)

def train_stage(cfg, arm, seed):
    return stage(cfg, 'train.py', seed=seed, data_dir=data_stage(cfg, arm, seed).data_dir,
                 **arm_settings(arm, cfg.n_head))

def arm_runs(cfg, arm, seed):
    """The runs of an arm and seed, in the order they are made: [(folder, config, recalibration length or None)]."""
    c = train.resolve(train_stage(cfg, arm, seed), data_meta(cfg, data_stage(cfg, arm, seed)))
    mixed = mixed_stage(cfg, arm, seed)
    mixed_meta = data_meta(cfg, mixed)
    folder = os.path.join(cfg.out_dir, c['condition'], f'seed{seed}')
    runs = [(folder, c, None)]
    if c['rope']:
        for length, keep in itertools.product(cfg.recal_iters, (False, True)):
            if keep and not length:
                continue                                    # kept and trained no further is the parent
            steps = drope.recal_steps(length, c['max_iters'])
            runs.append((drope.recal_folder(folder, length, cfg.recal_iters[0], c['max_iters'], keep),
                         drope.recal_config(c, folder, steps, keep, cfg.recal_lr_scale, mixed.data_dir, mixed_meta),
                         length))
    return runs

def published(cfg, folder=None):
    """Where an experiment, or one of its folders, is published."""
    place = os.path.join('results', os.path.basename(cfg.out_dir))
    return os.path.join(place, os.path.relpath(folder, cfg.out_dir)) if folder else place

def analysis_stage(cfg, folder, length):
    """The analysis of one run; in full before recalibration and at the lengths of full_at."""
    light = length is not None and -1 not in cfg.full_at and length not in cfg.full_at
    return stage(cfg, 'analyze.py', run=folder, causal=True, light=light)

def done_in(cfg, folder, c, length):
    """The folder that holds the analysis of this run: its own, or where it was published; None if it is to be done."""
    settings = {k: getattr(analysis_stage(cfg, folder, length), k) for k in analyze.SETTINGS}
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
    todo = [run for run in runs if not done_in(cfg, *run)]
    parent = runs[0][0]
    # the parent is trained, again if its checkpoint was deleted, where a run has still to start from it
    if any(run is runs[0] or not os.path.exists(os.path.join(run[0], 'ckpt.pt')) for run in todo):
        if not os.path.exists(os.path.join(parent, 'ckpt.pt')):
            todo = runs                                     # another parent, to the bit, on a GPU: all of it anew
            for folder, _, _ in runs:
                for name in ('ckpt.pt', 'log.jsonl', 'lens.json', 'analysis.json'):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(folder, name))
        train.main(train_stage(cfg, arm, seed))
    for folder, c, length in todo:
        if length is not None:
            mine = {'run': parent, 'keep_rope': c['keep_rope'], 'recal_data_dir': c['data_dir']}
            drope.recalibrate(stage(cfg, 'drope.py', **mine), length)
        analysis = analysis_stage(cfg, folder, length)
        if not analysis.light:
            # before analysis.json, which alone says that a run is done: one that was analysed or published without
            # lens.json is not made again, and tensor_lens.py --run=FOLDER adds it where the checkpoint still is
            tensor_lens.main(stage(cfg, 'tensor_lens.py', run=folder))
        analyze.main(analysis)
    if cfg.publish:
        for folder, _, _ in runs:
            publish_run(cfg, folder)

def steps_made(folder):
    """How many steps of a run are done, from its log."""
    try:
        return json.loads(open(os.path.join(folder, 'log.jsonl')).read().splitlines()[-1]).get('step', 0)
    except (OSError, ValueError, IndexError):
        return 0

def take_arms(cfg, queue, threads):
    """One of several processes: takes arms from the queue until it is empty, and compiles once for all of them."""
    torch.set_num_threads(threads)
    for pair in iter(queue.get, None):
        run_arm(cfg, *pair)

def run_together(cfg, todo, runs):
    """The arms, cfg.jobs at a time, in as many processes: on the GPUs in turn, or sharing the cores."""
    gpus = torch.cuda.device_count() if cfg.device in ('', 'cuda') else 0
    jobs, context = min(cfg.jobs, len(todo)), multiprocessing.get_context('spawn')
    threads = max(1, os.cpu_count() // jobs)            # also beside GPUs: five analyses with all cores each crawl
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
# the summary

def summarise(cfg, runs):
    """Write summary.json of runs that are all analysed, [(folder, config, length), ...]; returns it."""
    rows, references, logs, devices = [], [], {}, []
    for folder, c, _ in runs:
        a = json.load(open(os.path.join(folder, 'analysis.json')))
        log = [r for r in map(json.loads, open(os.path.join(folder, 'log.jsonl'))) if 'step' in r]
        ref, mean, probe = a['references'], a['mean'], a['probe']
        attention, order, kind = re.fullmatch(r'(mha|gqa)_(.+)_(\w+?)', a['condition']).groups()
        references.append(ref)
        devices.append(a['device'])
        logs[a['condition'], a['seed'], a['recal_steps']] = log
        rows.append({
            **{k: a[k] for k in ('condition', 'seed', 'recal_steps', 'keep_rope')}, 'attention': attention,
            'order': order, 'stage': kind, 'main': drope.is_main(folder), 'val_loss': a['val_loss'],
            'excess': a['val_loss'] - (ref['filter'] or 0.0),       # above this seed's own filter, in nats
            # of the way from the topic-blind bigram to the Bayes filter, on this seed's own data
            'gap_closed': (ref['bigram'] - a['val_loss']) / (ref['bigram'] - ref['filter']) if ref['filter'] else None,
            'orderedness': a['orderedness'] if 'orderedness' in a else orderedness(log),
            **{k: mean[k] for k in ('within', 'within_all', 'score_p', 'score_o', 'entropy', 'sink', 'self')},
            **{f'{k}_uniform': v for k, v in a['uniform'].items()},
            'probe': probe['accuracy'], **{f'probe_{k}': probe.get(k) for k in (
                'majority', 'token', 'ceiling', 'baseline', 'init', 'control', 'selectivity', 'shuffled', 'normalised',
                'posterior_r2')},
            'seconds': a['train_seconds']})
    mean = lambda key: float(np.mean([r[key] for r in references])) if references[0][key] is not None else None
    parents = {(r['attention'], r['order'], r['seed']): logs[r['condition'], r['seed'], None]
               for r in rows if r['stage'] == 'rope'}
    recovered = recovery(rows, logs) if references[0]['filter'] else []
    summary = {'experiment': os.path.basename(cfg.out_dir), 'references': {k: mean(k) for k in references[0]},
               'device': ' and '.join(dict.fromkeys(devices)), 'versions': a['versions'], 'n_layer': cfg.n_layer,
               'runs': rows, 'effects': effects(rows), 'matched': matched(rows), 'recovery': recovered,
               'recovery_effects': recovery_effects(recovered), 'forgetting': forgetting(parents)}
    shards.write_json(os.path.join(cfg.out_dir, 'summary.json'), summary)
    return summary

def number(values, form):
    """The mean of a sample and, of several, the half-width of its 95% interval; a dash where there is none."""
    if None in values:
        return '—'
    mean, low, _ = t_interval(values)
    return form.format(mean) + ('' if low is None else ' ± ' + form.format(mean - low).lstrip('+'))

def by_condition(runs):
    """Rows of summary.json by what the tables call them: condition, and recalibration length unless it is the main."""
    groups = {}
    for r in runs:
        groups.setdefault(r['condition'] + ('' if r['main'] else f', {r["recal_steps"]} steps'), []).append(r)
    return groups

def table(summary):
    """The log's table, with what uniform attention gives beside each column, as Markdown lines."""
    middle, groups = summary['n_layer'] // 2, by_condition(summary['runs'])
    uniform = lambda key, form: number([r[f'{key}_uniform'] for r in summary['runs'][:1]], form)
    bayes = summary['references']['filter'] is not None     # else there is no gap to close
    columns = {'Val loss': ('val_loss', '{:.4f}'), **({'Gap closed': ('gap_closed', '{:.1%}')} if bayes else {}),
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

def interval(low, high, digits=4):
    """A 95% interval as the tables write it."""
    return 'n=1: no interval' if low is None else f'[{low:+.{digits}f}, {high:+.{digits}f}]'

def effects_table(effects):
    """Paired differences as Markdown lines, the primary ones first."""
    lines = ['| Measure | Contrast | Difference | 95% interval | 80% power from | n | p (sign flip) | p (max-T) |',
             '|---' * 8 + '|']
    for e in sorted(effects, key=lambda e: not e['primary']):
        lines.append(f'| {"**primary** " if e["primary"] else ""}{e["measure"]} | {e["contrast"]} | {e["mean"]:+.4f} '
                     f'| {interval(e["low"], e["high"])} | {analyze.show(e["smallest"], ".4f")} | {e["n"]} '
                     f'| {analyze.show(e["p"], ".3f")} | {analyze.show(e["p_adjusted"], ".3f")} |')
    return lines

def equal_loss_table(summary):
    """Differences between arms at equal loss along DroPE, as Markdown lines; none without several lengths."""
    lines = ['| Measure | Contrast | Mean over the shared range | 95% interval | n | p (sign flip) |', '|---' * 6 + '|']
    for m in summary['matched']:
        mean, low, high = m['average']
        cells = ('no loss that both reach', '—') if mean is None else (f'{mean:+.4f}', interval(low, high))
        lines.append(f'| {m["measure"]} | {m["attention"]} {" - ".join(m["arms"])}, drope | {" | ".join(cells)} '
                     f'| {m["seeds"]} | {analyze.show(m["p"], ".3f")} |')
    return lines if summary['matched'] else []

def recovery_effects_table(summary):
    """How many times faster or slower arms recover, as Markdown lines."""
    lines = ['| Contrast, drope | Until within | log2 of the ratio of steps | 95% interval | n | p (sign flip) |',
             '|---' * 6 + '|']
    for e in summary['recovery_effects']:
        lines.append(f'| {e["contrast"]} | {e["loss"]} nats | {e["mean"]:+.3f} | {interval(e["low"], e["high"], 3)} '
                     f'| {e["n"]} | {analyze.show(e["p"], ".3f")} |')
    return lines if summary['recovery_effects'] else []

def order_table(summary):
    """Realised orderedness of each order, the mean over seeds, as Markdown lines."""
    found = {}
    for r in summary['runs']:
        if r['stage'] == 'rope' and r['orderedness'] is not None:
            found.setdefault(f'{r["attention"]} {r["order"]}', []).append(r['orderedness'])
    return ['| Order | Orderedness |', '|---|---|', *(f'| {k} | {np.mean(v):.3f} |' for k, v in found.items())]

def controls_table(summary):
    """The probe after the last layer beside its controls, of runs analysed in full, as Markdown lines."""
    columns = {'Probe': 'probe', 'Best reference': 'probe_baseline', 'Untrained': 'probe_init',
               'Control task': 'probe_control', 'Selectivity': 'probe_selectivity', 'Shuffled labels': 'probe_shuffled',
               'Normalised': 'probe_normalised', 'R² of the posterior': 'probe_posterior_r2'}
    last = lambda v: v[-1] if isinstance(v, list) else v
    groups = by_condition(r for r in summary['runs'] if r['probe_control'])
    lines = [f'| Condition | {" | ".join(columns)} |', '|---' * (len(columns) + 1) + '|']
    for name, rs in groups.items():
        cells = [number([last(r[key]) for r in rs], '{:.1%}') for key in columns.values()]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return lines if groups else []

def section(title, text, lines):
    """A section of the report; nothing where there are no lines."""
    return [f'## {title}', '', text, '', *lines, ''] if lines else []

def recovery_table(summary):
    """Steps of the longest recalibration until the loss is within so many nats of the filter, as Markdown lines."""
    groups = {}
    for r in summary['recovery']:
        groups.setdefault(r['condition'], []).append(r['steps'])
    if not groups:
        return []
    targets = summary['recovery'][0]['loss']
    within = ' | '.join(f'within {t} nats' for t in targets)
    lines = [f'| Condition | {within} | n |', '|---' * (len(targets) + 2) + '|']
    for name, steps in groups.items():
        lines.append(f'| {name} | {" | ".join(number(list(s), "{:,.0f}") for s in zip(*steps))} | {len(steps)} |')
    return lines

def attends_table(cfg, runs):
    """What the most topical heads of the first seed read, where the data are words, as Markdown lines."""
    lines = ['| Run | Head | P | Query\'s topic in what it reads (uniform) | Tokens read most, times uniform |',
             '|---' * 5 + '|']
    for folder, c, length in runs:
        if c['seed'] == cfg.seeds[0] and length in (None, cfg.recal_iters[0]):
            a = json.load(open(os.path.join(folder, 'analysis.json')))
            for h in a.get('attends') or ():
                tokens = ', '.join(f'`{t.strip() or repr(t)[1:-1]}` {r:.1f}' for t, r in h['tokens'])
                lines.append(f'| {a["condition"]} | L{h["layer"]}H{h["head"]} | {analyze.show(h["score_p"], "+.3f")} '
                             f'| {analyze.show(h["same"], ".1%")} ({analyze.show(h["same_uniform"], ".1%")}) '
                             f'| {tokens.replace("|", chr(92) + "|")} |')
    return lines if lines[2:] else []

def write_report(cfg, summary, runs, figures):
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
        f'Reference losses in nats: {nats}.' + ' Gap closed: from the topic-blind bigram to the Bayes filter.'
        * (ref['filter'] is not None), '',
        f'Probe references: majority {first["probe_majority"]:.1%}, token identity {first["probe_token"]:.1%}{ceiling} '
        f'(seed {first["seed"]}).', '',
        'Within: attention on keys of the query\'s topic, over queries with a choice; it is high for any local head. '
        'P: topic or contiguity, 0 for a head that knows positions alone. O: topic without contiguity, from other '
        'segments. Within, all: over all queries, as in the log.', '',
        *section('The probe and its controls', 'After the last layer. Best reference: of majority, token identity and '
                 'running means of embeddings (or the bag of tokens). Control task: a random label for each token '
                 'type; selectivity: topics minus that. Shuffled labels: of the middle layer. Normalised: 0 at the '
                 'best reference, 1 at the Bayes filter.', controls_table(summary)), '## Paired differences', '',
        'Primary, named beforehand: P, (topic - shuffled) under DroPE minus the same under kept RoPE. '
        + (f'The smallest p that {n} seeds can give is {2 / 2 ** n:.3g}.' if n > 1 else 'One seed allows no test.'), '',
        *(line + '\n' for line in verdict(summary)),
        *effects_table(summary['effects']), '',
        '80% power from: the smallest difference that this many seeds find four times in five, at the spread seen. '
        'Max-T: adjusted for all of the attention type\'s differences but the primary.', '',
        *section('At equal loss', 'Differences interpolated in the loss above the filter, along the recalibration '
                 'lengths of DroPE but 0, where both arms have points. Exploratory: the p-values stand alone.',
                 equal_loss_table(summary)),
        *section('Recovery', 'Steps of the longest recalibration until the validation loss is that near to the filter, '
                 'by a straight line between evaluations; — where a seed never gets there.', recovery_table(summary)),
        *section('Recovery, compared', '-1: in half the steps of the other arm. n: seeds in which both get there, '
                 'and no others. Exploratory: the p-values stand alone.',
                 recovery_effects_table(summary)),
        *section('Realised order', 'How much the step tells of a row\'s topic: 0 nothing (shuffled rows: what chance '
                 'leaves), 1 everything.', order_table(summary)),
        *section('What the most topical heads read', 'Keys 16 tokens away and more, rows that did not choose the '
                 'heads; first seed, main recalibration.', attends_table(cfg, runs)), '## Figures', '',
        *(f'![{os.path.basename(f)}]({os.path.relpath(f, cfg.out_dir)})\n' for f in figures)]
    shards.write_text(os.path.join(cfg.out_dir, 'summary.md'), '\n'.join(lines) + '\n')

def publish_file(cfg, source, copy):
    """Copy one JSON, Markdown or PNG file, atomic; curves thinned, strips of seed 0, maps and spectra as drawn."""
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    if source.endswith('log.jsonl'):
        lines = open(source).read().splitlines()
        step = max(1, len(lines) // 60)                     # a curve published before stays as it is
        kept = [line for i, line in enumerate(lines) if i % step == 0 or '"val_loss": null' not in line]
        shards.write_text(copy, '\n'.join(kept) + '\n')
    elif source.endswith('lens.json'):
        lens = json.load(open(source))
        if lens['seed'] != 0:
            lens['strip'] = None
        elif lens['strip'] and cfg.data_script == 'prepare_wiki.py':       # nor running text, not even as numbers
            lens['strip'] |= {'tokens': None, 'target': None}
        shards.write_text(copy, json.dumps(lens, allow_nan=False) + '\n')
    elif source.endswith('analysis.json'):
        a = json.load(open(source))
        if a['seed'] != 0 or a['keep_rope'] or not drope.is_main(os.path.dirname(source)):      # no figure has them
            a['maps'] = []
            if a['circuits']:
                a['circuits'] = {k: v for k, v in a['circuits'].items() if k not in ('qk', 'ov', 'init_spectra')}
        a['words'] = None                                   # running text, which is not ours to publish
        shards.write_text(copy, json.dumps(a, allow_nan=False) + '\n')
    elif source.endswith('summary.md'):
        shards.write_text(copy, open(source).read().replace('![words.png](figures/words.png)\n\n', ''))
    else:
        shutil.copy(source, copy + '.tmp')
        os.replace(copy + '.tmp', copy)

def publish_run(cfg, folder):
    """A run of a finished arm, at once: whatever stops the experiment, another machine will know that it is done."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(published(cfg, folder), 'analysis.json'))
    for name in ('config.json', 'log.jsonl', 'lens.json', 'analysis.json'):     # the last says that it is all there
        if name != 'lens.json' or os.path.exists(os.path.join(folder, name)):   # light runs and old ones have none
            publish_file(cfg, os.path.join(folder, name), os.path.join(published(cfg, folder), name))

def publish_results(cfg):
    """Copy all JSON and figures to results/<experiment>/, in place of what was there."""
    target = published(cfg)
    temporary, old = target + '.tmp', target + '.old'
    for folder in (temporary, old):                         # what a kill left behind
        shutil.rmtree(folder, ignore_errors=True)
    for folder, _, names in os.walk(cfg.out_dir):
        for name in names:
            if name.endswith(('.json', '.jsonl', '.md', '.png')) and name != 'words.png':
                publish_file(cfg, os.path.join(folder, name),
                             os.path.join(temporary, os.path.relpath(folder, cfg.out_dir), name))
    if os.path.exists(target):
        for path in glob.glob(os.path.join(target, '*.md')):        # notes written by hand stay
            if not os.path.exists(os.path.join(temporary, os.path.basename(path))):
                shutil.copy(path, temporary)
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
    for key in ('run', 'seed', 'order', 'cycles', 'cooldown', 'rope', 'n_kv_head', 'keep_rope', 'causal',
                'recal_data_dir'):
        if key in cfg.overrides:
            raise SystemExit(f'run_experiment.py: {key} = {cfg.overrides[key]!r} is not for an experiment, which takes '
                             f'arms and seeds (now {cfg.arms} and {cfg.seeds})')
    if cfg.data_script not in ('data_synth.py', 'prepare_wiki.py'):
        raise SystemExit(f'run_experiment.py: data_script = {cfg.data_script!r}: data_synth.py or prepare_wiki.py')
    if cfg.jobs < 1 or min(cfg.seeds) < 0:
        raise SystemExit(f'run_experiment.py: jobs = {cfg.jobs} must be at least 1, seeds = {cfg.seeds} not negative')
    train.check(cfg)
    drope.check(cfg)
    analyze.check(cfg)
    tensor_lens.check(cfg)
    plan = list(dict.fromkeys(itertools.product(cfg.arms, cfg.seeds)))
    if cfg.data_script == 'prepare_wiki.py':
        prepare_wiki.check(data_stage(cfg, *plan[0]))
        if not cfg.dry_run:
            make_data(cfg, plan)                            # its bytes are part of what a run is
    runs = {pair: arm_runs(cfg, *pair) for pair in plan}
    everything = [run for pair in plan for run in runs[pair]]
    places = {run[0]: done_in(cfg, *run) for run in everything}
    todo = [pair for pair in plan if not all(places[folder] for folder, _, _ in runs[pair])]
    steps = {pair: sum(c['max_iters'] for _, c, _ in runs[pair]) for pair in plan}
    print(f'{cfg.out_dir}: {len(cfg.arms)} arms x {len(cfg.seeds)} seeds, {len(everything)} runs, '
          f'{sum(steps.values()):,} steps; to do: {len(todo)} of {len(plan)} arms')
    taken = sum(place not in (None, folder) for folder, place in places.items())
    if taken:
        print(f'{taken} runs are done and published in {published(cfg)}: their JSON is taken from there')
    if cfg.dry_run:
        for folder, c, _ in everything:
            place = places[folder]
            other = not place and os.path.exists(os.path.join(folder, 'config.json')) and train.differences(
                c, read_config(folder))                     # the real command would stop there
            state = 'done ' if place else 'other' if other else 'to do'
            print(f'  {state}  {c["max_iters"]:>7,} steps  {place or folder}'
                  + (f': holds a run with another {", ".join(other[:3])}' if other else ''))
        row = cfg.block_size + 1                            # 2 bytes a token, 1 a label, 2 a topic of the posterior
        n_data = len({(pure, seed) for arm, seed in plan for pure in {False, '_pure' in arm}})
        data = n_data * row * ((cfg.train_rows + cfg.val_rows) * 3 + cfg.val_rows * cfg.n_topics * 2) / 2**30
        checkpoints = sum(disk_gib(c) for _, c, _ in everything)
        print(f'disk: {checkpoints:.2f} GiB of checkpoints'
              + f', {data:.2f} GiB of data' * (cfg.data_script == 'data_synth.py'))
        return

    # ---- what was published is read like the rest; what is published must not be lost
    for folder, c, _ in everything:
        place = places[folder]
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
    if cfg.data_script == 'data_synth.py':
        make_data(cfg, todo)
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
    for name in ('clusters.json', 'topics.md'):             # what the topics are, where they are clusters
        path = os.path.join(data_stage(cfg, *plan[0]).data_dir, name)
        if os.path.exists(path):
            shutil.copy(path, cfg.out_dir)
    summary = summarise(cfg, everything)
    figures = plot.main(stage(cfg, 'plot.py', paths=[cfg.out_dir]))
    for name in plot.CAPTIONS:                              # of an earlier report, and no longer drawn
        path = os.path.join(cfg.out_dir, 'figures', f'{name}.png')
        if path not in figures and os.path.exists(path):
            os.remove(path)
    write_report(cfg, summary, everything, figures)
    differences = [e for e in summary['effects'] if 'drope - kept' in e['contrast']]
    if len(differences) > 20:                               # on the screen; the report has them all
        differences = [e for e in differences if e['measure'] in ('score_p', 'probe', 'val_loss')]
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
