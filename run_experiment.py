"""
A whole experiment: data, training, dropping, analysis, report and figures, for every arm and seed.

Reads what is done in out_dir and results/. Writes datasets into data_dir, a folder a run, runs.jsonl, summary.md and
figures/ into out_dir; --publish=True copies rows, report and figures to results/<experiment>/.

    python run_experiment.py config/demo.py
    python run_experiment.py config/run1.py --dry_run=True          # the plan, a line a run
    python run_experiment.py config/structured.py --part=2/8        # one of eight such commands that share a folder

What is done is skipped: a run is done when a row with its settings is there, in out_dir or published under
results/, even where its checkpoint was deleted. A row that an older version of the measures made, or other
settings of the analysis, is made again where the checkpoint is. Stop it at any time; the same command goes on.
"""
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from itertools import chain, product
from os.path import basename, exists, normpath
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tqdm import tqdm

import analyze
import drope
import measures
import plot
import report
import runs
import shards
import train
import view
from configurator import SCRIPTS, be_patient, block, command
from machine import threads

# -----------------------------------------------------------------------------
# config

arms = ('mha_shuffled', 'mha_topic_ordered')    # runs.ARM_NAMES says what can be put here
seeds = (0,)                # one seed is one dataset and one initialisation, shared by all arms [0, 2**63)
base = 'shuffled'           # the order that others are compared with
placebo = 'pseudo'          # the order that has the schedule of another, without its meaning
primary = ('score_p', 'topic_ordered', 'drope')     # named beforehand: measure, order - base, positions
course_seeds: int = None    # further recalibration lengths, on the first so many seeds; none = all [1, 2**31)
rows_from = ''              # a folder of results: its rows are taken where this plan has the same runs
part = '1/1'                # '2/8': the second of eight shares of arms and seeds
jobs = 1                    # arms trained at a time, in as many processes, spread over the GPUs [1, 2**31)
data_script = 'data_synth.py'   # makes the data: a script with main and parameters; '' = data_dir is a dataset
dry_run = False             # print the plan and stop
publish = False             # copy rows, report and figures to results/<experiment>/

# -----------------------------------------------------------------------------
# the plan

OF_AN_ARM = {'run', 'other', 'seed', 'repeat', 'order', 'cycles', 'cooldown', 'n_kv_head', 'keep_rope', 'causal',
             'recal_data_dir'}

class Run(NamedTuple):
    folder: str
    config: dict            # as config.json will have it

def stage(cfg, script, **changes):
    """The config of one stage, from that of the experiment."""
    return SimpleNamespace(**{key: getattr(cfg, key) for key in block(script)} | changes)

def data_stage(cfg, seed, arm=None):
    """
    The dataset of an arm; of no arm, that with mixed rows. Pure arms: training rows of one segment each, the same
    chains and validation rows. There is one micro-language a seed; of any other data there is one, and a seed is
    initialisation and order.
    """
    keys = block(cfg.data_script or 'data_synth.py')        # of a dataset that is there data_dir alone counts
    at = SimpleNamespace(**{key: cfg.overrides.get(key, setting.default) for key, setting in keys.items()})
    if cfg.data_script == 'data_synth.py':
        at.seed = seed
    if arm and runs.arm_settings(arm, cfg.n_head)['pure']:
        if 'min_segments' not in keys:
            raise SystemExit(f'arms: {arm} wants a data_script that cuts rows by min_segments, not {cfg.data_script!r}')
        at.min_segments = at.max_segments = 1
        at.data_dir += '_pure'
    return at

def data_module(cfg):
    return importlib.import_module(cfg.data_script.removesuffix('.py'))

def data_meta(cfg, at, seed):
    """What a dataset is, or will be: before it is made only its plan can be told."""
    folder = train.data_folder(at.data_dir, seed)
    if cfg.data_script == 'data_synth.py' or cfg.data_script and not exists(f'{folder}/meta.json'):
        return data_module(cfg).parameters(at)
    return shards.read_meta(folder)

def make_data(cfg, pairs):
    """Every dataset that these arms and seeds read, unless it is there."""
    stages = {}
    for arm, seed in pairs:
        for at in (data_stage(cfg, seed), data_stage(cfg, seed, arm)):
            stages[str(at)] = at
    with runs.locked(f'{cfg.data_dir}.parts', wait=True):   # another part may be at it
        for at in stages.values():
            data_module(cfg).main(at)

def train_stage(cfg, arm, seed):
    """The training of an arm and seed."""
    return stage(cfg, 'train.py', seed=seed, data_dir=data_stage(cfg, seed, arm).data_dir,
                 **runs.arm_settings(arm, cfg.n_head))

def arm_runs(cfg, arm, seed):
    """The runs of an arm and seed, in the order they are made; recalibration reads mixed rows, in pure arms too."""
    mixed = data_stage(cfg, seed)
    meta = data_meta(cfg, mixed, seed)
    own = data_meta(cfg, data_stage(cfg, seed, arm), seed)
    c = train.resolve(train_stage(cfg, arm, seed), own)
    folder = runs.run_folder(cfg.out_dir, c)
    found = [Run(folder, c)]
    recal = stage(cfg, 'drope.py', run=folder)
    for path, config in drope.recalibrations(recal, c, mixed.data_dir, meta):
        if runs.is_main(path) or seed in cfg.seeds[:cfg.course_seeds]:
            found.append(Run(path, config))
    return found

def has_checkpoint(run):
    return exists(f'{run.folder}/ckpt.pt')

def rows_by_key(folder):
    """{key: row} of a published experiment."""
    return {runs.key(row): row for row in runs.read_rows(folder)[1]}

def row_of(run, published):
    """
    The row of a run that is done, from its folder or, where no other run is in it, among those that are published,
    {key: row}; None where it is to be made.
    """
    row = runs.read_row(run.folder)
    if row is None and not exists(f'{run.folder}/config.json'):
        row = published.get(runs.key(runs.columns(run.config)))
    if row and not runs.differences(run.config, row['config']):
        return row | {'main': runs.is_main(run.folder)}

def to_do(cfg, run, published):
    """
    Whether a run has still to be made, or measured again: by these measures and settings, where its checkpoint is.
    """
    row = row_of(run, published)
    if row is None:
        return True
    settings = {key: getattr(cfg, key) for key in analyze.SETTINGS}
    stale = row['measures_version'] != measures.VERSION or row['settings'] != settings
    return stale and has_checkpoint(run)

def share(cfg, plan):
    """The arms and seeds of cfg.part: every n-th of them, those with most work first, which evens out the parts."""
    number, _, parts = cfg.part.partition('/')
    if not (number.isdecimal() and parts.isdecimal() and 0 < int(number) <= int(parts)):
        raise SystemExit(f'part = {cfg.part}: 2/8, say, is the second of eight')
    by_work = sorted(plan, key=lambda pair: -sum(run.config['max_iters'] for run in plan[pair]))
    return by_work[int(number) - 1::int(parts)]

# -----------------------------------------------------------------------------
# the work

def run_arm(cfg, arm, seed):
    """Train an arm of one seed, drop and keep RoPE, analyse each; what is done is skipped."""
    if ended:
        raise SystemExit                                    # the pool hands on what it had taken already
    plan = arm_runs(cfg, arm, seed)
    parent = plan[0]
    with runs.locked(f'{parent.folder}/arm'):               # all of it: what is deleted may be another's
        todo = [run for run in plan if to_do(cfg, run, {})]
        if not has_checkpoint(parent) and not all(map(has_checkpoint, todo)):
            todo = plan                                     # another parent, to the bit, on a GPU: all of it anew
            for run in plan:
                runs.open_run(run.folder, run.config)       # stops where a run with other settings is
            for run, name in product(plan, ('ckpt.pt', 'log.jsonl', 'row.json')):
                with suppress(FileNotFoundError):
                    os.remove(f'{run.folder}/{name}')
        for run in todo:
            with redirect_stdout(None):                     # analyze.py tells of a run that is finished
                if run is parent:
                    train.main(train_stage(cfg, arm, seed))
                else:
                    data = train.read_data(run.config, run.folder)
                    drope.recalibrate(stage(cfg, 'drope.py', run=parent.folder), run.folder, run.config, data)
            analyze.main(stage(cfg, 'analyze.py', run=run.folder))
    collect(cfg)

def collect(cfg):
    """runs.jsonl of the plan's rows that are there; published at once: another machine will know what is done."""
    compare = {'base': cfg.base, 'placebo': cfg.placebo, 'primary': cfg.primary}
    runs.gather(cfg.out_dir, cfg.folders, compare, cfg.place if cfg.publish else '')

def begin_worker(jobs):
    """A process of the pool, before its first arm."""
    be_patient()
    torch.set_num_threads(min(threads(jobs), torch.get_num_threads()))      # analyses share the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the first process's, which ends this one
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.stdout.isatty():
        sys.stdout = None                                   # there is the bar

def end_with_parent():
    """Ends a process of the pool whose parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)

ended = False

def leave(*_):
    """A process of the pool ends in good order, and says nothing."""
    global ended
    ended = True
    raise SystemExit

def kill(workers):
    """Ends processes that a compiler, say, keeps from ending themselves."""
    for worker in workers:
        worker.kill()

def watch(bar, mine):
    """Moves the bar to the steps that are made, and names the runs that have begun and have no row yet."""
    steps, now = 0, []
    for run in mine:
        log = runs.read_log(run.folder)
        if log:
            steps += log[-1]['step']
            if not exists(f'{run.folder}/row.json'):
                now.append(run.folder)
    bar.set_postfix_str(', '.join(now), refresh=False)
    bar.update(steps - bar.n)

def run_arms(cfg, todo, plan):
    """
    The data and the arms, cfg.jobs at a time, in as many processes, each of which compiles once for all of its arms.
    One bar, on a terminal; elsewhere a line for each dataset and each run that is finished.
    """
    jobs = min(cfg.jobs, len(todo))
    gpus = min(jobs, torch.cuda.device_count()) if cfg.device in ('', 'cuda') else 0
    mine = [run for pair in todo for run in plan[pair] if to_do(cfg, run, {})]
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), begin_worker, (jobs,))
    bar = tqdm(total=sum(run.config['max_iters'] for run in mine), unit='step', smoothing=0, disable=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # as Ctrl-C: it ends the workers too
    waiting = set()
    try:
        if cfg.data_script == 'data_synth.py':              # other data are there, shared by all seeds
            pool.submit(make_data, cfg, todo).result()
        for i, pair in enumerate(todo):
            device = f'cuda:{i % gpus}' if gpus else cfg.device
            own = SimpleNamespace(**vars(cfg) | {'device': device})
            waiting.add(pool.submit(run_arm, own, *pair))
        watch(bar, mine)
        bar.initial = bar.n                                 # steps of an earlier time tell nothing of the pace
        while waiting:
            done, waiting = wait(waiting, timeout=1)
            for future in done:
                future.result()
            watch(bar, mine)
    except BrokenProcessPool:
        raise SystemExit(f'{cfg.out_dir}: an arm was killed, perhaps for lack of memory; try a lower --jobs') from None
    finally:
        bar.close()
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        killer = threading.Timer(10, kill, [workers])
        killer.start()
        pool.shutdown(cancel_futures=True)
        killer.cancel()

# -----------------------------------------------------------------------------
# the end

def check(cfg):
    """Stops with one line at the first setting that can't work."""
    for key in OF_AN_ARM.union(*runs.POSITIONS.values()):
        if key in cfg.overrides:
            raise SystemExit(f'run_experiment.py: {key} = {cfg.overrides[key]!r} is not for an experiment, which '
                             f'takes arms and seeds (now {cfg.arms} and {cfg.seeds})')
    if basename(cfg.data_script) != cfg.data_script:
        raise SystemExit(f'data_script = {cfg.data_script}: not a folder, the name of a script beside this one')
    if cfg.data_script and 'data_dir' not in block(cfg.data_script):
        raise SystemExit(f'data_script = {cfg.data_script}: makes no data; it has main, parameters and, in its block, '
                         'a data_dir')
    if len(cfg.primary) != 3 or cfg.primary[0] not in report.OUTCOMES:
        raise SystemExit(f'primary = {cfg.primary}: a measure ({", ".join(report.OUTCOMES)}), an order and its '
                         'positions')
    for order in (cfg.base, cfg.placebo):
        train.check(SimpleNamespace(order=order))
    for arm in cfg.arms:
        train.check(train_stage(cfg, arm, 0))

def take_published(everything, published):
    """What is published is read like the rest: its rows are put into the folders of their runs."""
    for run in everything:
        row = row_of(run, published)
        if row and row != runs.read_row(run.folder):        # it is elsewhere, or of another main length
            runs.open_run(run.folder, run.config)           # stops where a run with other settings is
            runs.write_json(f'{run.folder}/row.json', row)

def make_report(cfg, plan, everything):
    """runs.jsonl, examples.json, figures and summary.md of the plan's runs."""
    for name in ('clusters.json', 'topics.md'):             # what the topics are, where they are clusters
        with suppress(FileNotFoundError):
            shutil.copy(f'{cfg.data_dir}/{name}', cfg.out_dir)
    for (arm, seed), mine in plan.items():                  # CKA with the arms before it, into the row
        for other in cfg.arms[:cfg.arms.index(arm)]:
            for run, theirs in zip(mine, plan[other, seed]):
                analyze.compare_states(run.folder, theirs.folder, cfg.device)
    collect(cfg)
    examples = runs.read_json(f'{cfg.place}/examples.json') or {}
    for run in everything:                                  # the first seed's main runs, those of kept RoPE aside
        own = runs.read_json(f'{run.folder}/example.json')
        if own and run.config['seed'] == cfg.seeds[0] and not run.config['keep_rope'] and runs.is_main(run.folder):
            examples[runs.columns(run.config)['condition']] = own
    runs.write_json(f'{cfg.out_dir}/examples.json', examples)
    try:
        with redirect_stdout(None):
            plot.main(stage(cfg, 'plot.py', paths=[cfg.out_dir]))
    finally:                                                # the numbers, whatever becomes of the pictures
        report.main(SimpleNamespace(paths=[cfg.out_dir]))

def make_page(cfg, plan):
    """view.html of the base arm's first seed, RoPE beside DroPE, one validation row; what fails here stops nothing."""
    arm = next((arm for arm in cfg.arms if runs.arm_settings(arm, cfg.n_head)['order'] == cfg.base), cfg.arms[0])
    run, *recalibrated = plan[arm, cfg.seeds[0]]            # the first of these is DroPE, for the main length
    other = recalibrated[0].folder if recalibrated else ''
    try:
        view.main(stage(cfg, 'view.py', run=run.folder, other=other, view_rows=(0,)))
    except (Exception, SystemExit) as error:
        print(f'{run.folder}: no page of it ({error})')

def main(cfg):
    cfg.out_dir = normpath(cfg.out_dir)
    cfg.place = f'results/{basename(cfg.out_dir)}'          # where it is published
    cfg.arms = tuple(dict.fromkeys(cfg.arms))               # what is named twice is one
    cfg.seeds = tuple(dict.fromkeys(cfg.seeds))
    check(cfg)

    # ---- the plan; the bytes of a dataset that all seeds share are part of it
    pairs = [(arm, seed) for seed, arm in product(cfg.seeds, cfg.arms)]         # whole seeds, one by one
    if cfg.data_script not in ('', 'data_synth.py') and not cfg.dry_run:
        make_data(cfg, pairs)
    plan = {pair: arm_runs(cfg, *pair) for pair in pairs}
    everything = list(chain(*plan.values()))
    cfg.folders = [run.folder for run in everything]
    own = rows_by_key(cfg.place)
    theirs = rows_by_key(cfg.rows_from) if cfg.rows_from else {}
    if cfg.rows_from and not theirs:
        raise SystemExit(f'rows_from = {cfg.rows_from}: holds no runs.jsonl')
    published = theirs | own
    mine = share(cfg, plan)
    todo = [pair for pair in mine if any(to_do(cfg, run, published) for run in plan[pair])]
    steps = sum(run.config['max_iters'] for run in everything)
    print(f'{cfg.out_dir}: {len(cfg.arms)} arms x {len(cfg.seeds)} seeds, {len(everything)} runs, {steps:,} steps; '
          f'to do: {len(todo)} of {len(mine)} arms', flush=True)
    if cfg.dry_run:
        for run in everything:
            state = 'to do' if to_do(cfg, run, published) else 'done '
            print(f'  {state}  {run.config["max_iters"]:>7,} steps  {run.folder}')
        return
    lost = own.keys() - {runs.key(runs.columns(run.config)) for run in everything}
    if cfg.publish and lost:
        row = own[min(lost)]
        raise SystemExit(f'{cfg.place}: holds {row["condition"]} of seed {row["seed"]}, which is not in this plan and '
                         'would be lost; add its arm and seed, or delete it')

    # ---- data, every arm, the report
    with runs.locked(f'{cfg.out_dir}/report', wait=True):   # parts may begin at once
        take_published(everything, published)
    if todo:
        run_arms(cfg, todo, plan)
    missing = sum(row_of(run, {}) is None for run in everything)
    if missing:
        print(f'part {cfg.part} is done; {missing} runs of other parts are not, so there is no report yet')
        return
    with runs.locked(f'{cfg.out_dir}/report', wait=True):   # two parts may end at once
        make_report(cfg, plan, everything)
        make_page(cfg, plan)
        if cfg.publish:
            runs.publish(cfg.out_dir, cfg.place)

if __name__ == '__main__':
    command(main, __file__, stages=SCRIPTS[:-1])
