"""
How fast a config trains: the step of train.py beside the same step in plain PyTorch, in one run.

Reads nothing but the config: random tokens, no dataset. Writes out/bench/<config>.json.

    python bench.py config/run1.py                              # GPU
    python bench.py config/demo.py --bench_steps=20             # a CPU will do
    torchrun --nproc_per_node=2 bench.py config/run1.py --scaling=True      # GPUs, after the same with one

Times are medians over bench_steps steps, with the 10th and 90th percentile, after a warm-up that compiles. MFU: the
products that a step cannot do without, 6 N a token (N parameters, the tied matrix once) and
6 n_layer n_head head_dim block_size for causal attention, over the step's time, over the rate at which the device
multiplies two large random matrices of the same type.
"""
import itertools
import json
import time
from pathlib import Path

import torch

from configurator import SCRIPTS, command
from machine import machine, memory_errors, processes, versions
from model import build
from optim import optimizers, split_parameters
from runs import read_json, write_json
from train import check, compiled, lr_scale, micro_batch, resolve, training_step

# -----------------------------------------------------------------------------
# config

bench_steps = 60            # timed steps, after warm-up [10, 2**31)
scaling = False             # under torchrun: a row for this number of GPUs in out/bench/<config>_scaling.json

# -----------------------------------------------------------------------------

WARMUP = 6                  # steps before those that are timed
N_ROWS = 4096               # rows of random tokens
PROFILED = 5                # steps that are profiled

def plain_step(model, c, corpus, batches, dtype):
    """The step as one would write it first: eager, torch's own Muon, the schedule in Python. Arguments as in
    train.training_step; returns a function that makes a step and returns the loss in nats."""
    matrices, others = split_parameters(model)
    muon = torch.optim.Muon(matrices, lr=c['muon_lr'], momentum=0.95, nesterov=True, weight_decay=c['weight_decay'])
    adamw = torch.optim.AdamW(others, lr=c['adam_lr'], betas=(0.9, 0.95), weight_decay=c['weight_decay'])
    count = itertools.count()

    def step():
        n = next(count)
        total = 0
        for rows in batches[n]:
            x = corpus[rows].long()
            with torch.autocast(corpus.device.type, torch.bfloat16, dtype == 'bfloat16'):
                loss = model(x[:, :-1], x[:, 1:]).mean() / c['grad_accum']
            loss.backward()
            total = total + loss.detach()
        if c['grad_clip']:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c['grad_clip'])
        scale = lr_scale(n, c)
        muon.param_groups[0]['lr'] = c['muon_lr'] * scale
        adamw.param_groups[0]['lr'] = c['adam_lr'] * scale
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        return total

    return step

def timed(step, n, device):
    """(milliseconds of n calls of `step` after a warm-up, each waited for, sorted; of the very first)."""
    times = []
    for _ in range(WARMUP + n):
        clock = time.perf_counter()
        step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - clock))
    return sorted(times[WARMUP:]), times[0]

def matmul_rate(device, dtype):
    """TFLOP/s of a large product of random normals: 8192^3 on a GPU, 1024^3 on a CPU."""
    n = 8192 if device.type == 'cuda' else 1024
    g = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype), generator=g)

    def product():
        a @ b

    times, _ = timed(product, 21, device)
    return 2 * n ** 3 / times[10] / 1e9

def random_rows(c, device):
    """Random tokens on the device [N_ROWS, block_size + 1], and the rows that this process reads, as in train.fit."""
    rank, world = processes()
    g = torch.Generator().manual_seed(c['seed'])
    corpus = torch.randint(c['vocab_size'], (N_ROWS, c['block_size'] + 1), generator=g, dtype=torch.int32)
    batches = torch.randint(N_ROWS, (c['max_iters'], c['grad_accum'], world, micro_batch(c, world)), generator=g)
    return corpus.to(device), batches[:, :, rank].to(device)

def communication(step, ms):
    """The share of a step of `ms` milliseconds that NCCL's kernels take, waiting for other GPUs included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    spent = sum(event.device_time_total for event in profile.key_averages() if 'nccl' in event.key)
    return spent / 1000 / PROFILED / ms

def measure(c, n, device, dtype, compile):
    """The step of train.py, on as many GPUs as there are processes: a dictionary. The first step includes the import
    of the compiler."""
    corpus, batches = random_rows(c, device)
    model = build(c).to(device)
    clock = time.perf_counter()
    loss_of = compiled(model) if compile else model
    muon, adamw = optimizers(model, c, dtype, compile)
    step, _ = training_step(model, loss_of, muon, adamw, c, corpus, batches, 0, dtype)
    start = time.perf_counter() - clock
    times, first = timed(step, n, device)
    ms = times[n // 2]
    return {
        'gpus': processes()[1],
        'batch_size': c['batch_size'],
        'parameters': sum(p.numel() for p in model.parameters()),
        'first_step_s': start + first / 1000,
        'ms_per_step': ms,
        'ms_spread': [times[n // 10], times[-1 - n // 10]],
        'rows_per_s': 1000 * c['batch_size'] / ms,
        'communication': communication(step, ms) if device.type == 'cuda' else None}

def compare(c, n, device, dtype, compile):
    """The same beside plain PyTorch, and as a share of what the device can do."""
    row = measure(c, n, device, dtype, compile)
    rate = matmul_rate(device, dtype)
    model = build(c).to(device)
    plain, _ = timed(plain_step(model, c, *random_rows(c, device), dtype), n, device)
    # operations of the products of a step, forward and backward
    attention = c['n_layer'] * c['n_head'] * c['head_dim'] * c['block_size']
    flops = c['batch_size'] * c['block_size'] * 6 * (row['parameters'] + attention)
    return row | {
        'mfu': flops / row['ms_per_step'] / 1e9 / rate,
        'matmul_tflops': rate,
        'reference_ms': plain[n // 2],
        'ratio': plain[n // 2] / row['ms_per_step']}

def add_scaling(rows, c, *how):
    """The rows of a table with those of this number of GPUs: at equal global batch, and at batch_size rows a GPU. Their
    ratio is to one GPU, where that is in the table."""
    _, world = processes()
    rows = [row for row in rows if row['gpus'] != world]
    for batch_size in dict.fromkeys((c['batch_size'], c['batch_size'] * world)):
        rows.append(measure(c | {'batch_size': batch_size}, *how))
    one = [row['rows_per_s'] for row in rows if row['gpus'] == 1]
    for row in rows:
        row['ratio'] = row['rows_per_s'] / one[0] if one else None
    return rows

def main(cfg):
    check(cfg)
    device, dtype, compile = machine(cfg.device, cfg.dtype, cfg.compile)
    c = resolve(cfg, {'vocab_size': cfg.vocab_size, 'block_size': cfg.block_size})
    c['max_iters'] = WARMUP + cfg.bench_steps + PROFILED
    how = cfg.bench_steps, device, dtype, compile
    name = Path(cfg.files[-1]).stem if cfg.files else 'default'
    path = f'out/bench/{name}_scaling.json' if cfg.scaling else f'out/bench/{name}.json'
    found = versions(device) | {'config': name, 'dtype': dtype, 'compiled': compile}
    with memory_errors('a lower --batch_size needs less, and is another benchmark'):
        if cfg.scaling:
            before = read_json(path) or {}
            same = before.get('device') == found['device']  # another device's rows are another table
            found['rows'] = add_scaling(before['rows'] if same else [], c, *how)
        else:
            found |= compare(c, *how)
    if processes()[0] == 0:
        print(json.dumps(found, indent=1))
        write_json(path, found)

if __name__ == '__main__':
    command(main, __file__, stages=SCRIPTS)
