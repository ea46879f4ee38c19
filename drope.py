"""
Drop RoPE from a trained run and recalibrate (DroPE, arXiv 2512.12167); or keep it, as the control.

Reads the run folder that train.py left, and its dataset. Writes config.json, log.jsonl and ckpt.pt into
..._drope/seed<k>/ (or ..._kept/seed<k>/) beside it; further lengths go to recal_<steps>/ inside that.

    python drope.py --run=out/single/mha_topic_ordered_rope/seed0 --recal_iters=0.1
    python drope.py --run=out/single/mha_topic_ordered_rope/seed0 --recal_iters=0.1 --keep_rope=True

The parent's weights, no positions (or the same positions), a fresh optimizer and schedule, shuffled rows: the same
rows, steps and rates for every arm of a seed (what was trained on pure windows is given the mixed rows of the others
with --recal_data_dir, as run_experiment.py does). Each length of recal_iters is a schedule of its own from the same
parent; the first is the main one, and 0 drops RoPE and trains no further.
"""
from itertools import product
from os.path import exists

import shards
from configurator import block, command
from machine import machine, memory_errors, processes
from model import build, load, load_weights
from runs import columns, locked, read_config, recal_folder
from train import RAISE_GRAD_ACCUM, fit, read_data

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the trained run
recal_data_dir = ''         # dataset to recalibrate on; '' = the parent's
recal_iters = (0.01,)       # lengths: a fraction of the parent's steps, or from 1 on whole steps [0, 2**31)
keep_rope = False           # true: the RoPE-kept control
recal_lr_scale = (1.0,)     # the parent's learning rates times this; one for all lengths or one for each [0, inf)
grad_accum = 1              # micro-batches a step is cut into: less memory, the same mathematics [1, 2**31)
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one
dtype = ''                  # float32 or bfloat16 (autocast); '' = bfloat16 on cuda, float32 on cpu
compile: bool = None        # torch.compile; none = with cuda, from a thousand steps on

# -----------------------------------------------------------------------------

RECAL_STREAM = 1            # of row_order: other draws than training's, the same in every arm

def schedules(cfg, parent_steps):
    """[(steps, lr_scale)] of cfg.recal_iters, at least 1 step unless the length is 0. Stops with one line at lengths
    that can't be."""
    lengths, scales = cfg.recal_iters, cfg.recal_lr_scale
    if len(scales) == 1:
        scales *= len(lengths)
    steps = []
    for length in lengths:
        if length >= 1 and length % 1:
            raise SystemExit(f'recal_iters = {length}: a fraction below 1, or whole steps')
        steps.append(max(1, round(length * parent_steps)) if 0 < length < 1 else int(length))
    if steps[0] == 0 or len(set(steps)) < len(steps):
        raise SystemExit(f'recal_iters = {lengths}: the first is above 0, and of {parent_steps} steps all differ')
    if len(scales) != len(steps):
        raise SystemExit(f'recal_lr_scale = {scales}: one number, or one for each of recal_iters = {lengths}')
    return list(zip(steps, scales))

def recal_config(parent_config, parent, steps, keep_rope, lr_scale, data_dir, meta):
    """The parent's config with what recalibration changes."""
    rows = {k: v for k, v in shards.parameters(meta).items() if k not in block('train.py')}     # seed is the run's own
    c = parent_config | rows
    return c | {
        'parent': parent,
        'data_dir': data_dir,
        'rope': keep_rope,
        'keep_rope': keep_rope,
        'max_iters': steps,
        'recal_steps': steps,
        'order': 'shuffled',
        'cycles': 1,
        'cooldown': 0.0,
        'parent_order': c['order'],
        'parent_cycles': c['cycles'],
        'parent_cooldown': c['cooldown'],
        'parent_iters': c['max_iters'],
        'parent_max_segments': parent_config.get('max_segments'),
        'muon_lr': c['muon_lr'] * lr_scale,
        'adam_lr': c['adam_lr'] * lr_scale,
        'eval_interval': max(1, min(c['eval_interval'], steps // 8)),
        'log_interval': min(c['log_interval'], 5)}

def recalibrations(cfg, parent, data_dir, meta):
    """
    [(folder, config)] of all recalibrations of the run cfg.run, whose config is `parent`: of each length without RoPE,
    then with it. [] where it has other positions, which are not dropped: their names would be RoPE's. data_dir, meta:
    of the rows they read.
    """
    if columns(parent)['positions'] != 'rope':
        return []
    plan = schedules(cfg, parent['max_iters'])
    found = []
    for (steps, scale), keep_rope in product(plan, (False, True)):
        if keep_rope and not steps:
            continue                                        # kept and trained no further is the parent
        further = None if steps == plan[0][0] else steps
        config = recal_config(parent, cfg.run, steps, keep_rope, scale, data_dir, meta)
        found.append((recal_folder(cfg.run, keep_rope, further), config))
    return found

def recalibrate(cfg, folder, c, data):
    """One of the recalibrations of cfg.run, into its folder. data: shards.read(...)."""
    c = c | {'grad_accum': cfg.grad_accum}
    where = machine(cfg.device, cfg.dtype, cfg.compile, c['max_iters'])
    with memory_errors(RAISE_GRAD_ACCUM.format(**c)), locked(folder, processes()[0]):
        model = build(c)
        if not exists(f'{folder}/ckpt.pt'):                 # else fit resumes from that one
            load_weights(model, load(cfg.run).state_dict(), cfg.run)
        fit(model.to(where[0]), c, data, folder, where, RECAL_STREAM)

def main(cfg):
    parent = read_config(cfg.run)
    wanted = {'data_dir': cfg.recal_data_dir, 'seed': parent['seed']} if cfg.recal_data_dir else parent
    data = read_data(wanted, cfg.run)
    found = recalibrations(cfg, parent, wanted['data_dir'], data.meta)
    if not found:
        raise SystemExit(f'{cfg.run}: not a run trained with RoPE alone, so there is none to drop')
    for folder, c in found:
        if c['keep_rope'] == cfg.keep_rope:
            recalibrate(cfg, folder, c, data)

if __name__ == '__main__':
    command(main, __file__)
