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
import os
import time

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
        scale = lr_scale(n, c['max_iters'], c['warmup_iters'])
        muon.param_groups[0]['lr'] = c['muon_lr'] * scale
        adamw.param_groups[0]['lr'] = c['adam_lr'] * scale
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        return total

    return step

def step_flops(c, n_parameters):
    """Floating-point operations of the products of a step, forward and backward."""
    attention = c['n_layer'] * c['n_head'] * c['head_dim'] * c['block_size']
    return c['batch_size'] * c['block_size'] * 6 * (n_parameters + attention)

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
    """TFLOP/s of large products of random normals: 8192^3 on a GPU, 1024^3 on a CPU."""
    n = 8192 if device.type == 'cuda' else 1024
    g = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype), generator=g)

    def products():
        for _ in range(10):                                 # as in a step: waited for once
            a @ b

    times, _ = timed(products, 11, device)
    return 10 * 2 * n ** 3 / times[5] / 1e9

def random_rows(c, device):
    """Random tokens on the device [N_ROWS, block_size + 1], and the rows that this process reads, as in train.fit."""
    rank, world = processes()
    g = torch.Generator().manual_seed(c['seed'])
    corpus = torch.randint(c['vocab_size'], (N_ROWS, c['block_size'] + 1), generator=g, dtype=torch.int32)
    batches = torch.randint(N_ROWS, (c['max_iters'], c['grad_accum'], world, micro_batch(c, world)), generator=g)
    return corpus.to(device), batches[:, :, rank].to(device)

def our_step(model, c, corpus, batches, dtype, compile):
    """The step of train.py, a function."""
    loss_of = compiled(model) if compile else model
    muon, adamw = optimizers(model, c, dtype, compile)
    step, _ = training_step(model, loss_of, muon, adamw, c, corpus, batches, 0, dtype)
    return step

def communication(step, ms):
    """The share of a step of `ms` milliseconds that NCCL's kernels take, waiting for other GPUs included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    spent = sum(event.device_time_total for event in profile.key_averages() if 'nccl' in event.key)
    return spent / 1000 / PROFILED / ms

def scaling_rows(c, n, path, device, dtype, compile):
    """Add this number of GPUs to the table at `path`: at equal global batch, and at batch_size rows a GPU."""
    rank, world = processes()
    table = read_json(path) or {**versions(device), 'rows': []}
    for batch_size in dict.fromkeys((c['batch_size'], c['batch_size'] * world)):
        corpus, batches = random_rows(c | {'batch_size': batch_size}, device)
        model = build(c, torch.Generator().manual_seed(0)).to(device)
        step = our_step(model, c, corpus, batches, dtype, compile)
        times, _ = timed(step, n, device)
        ms = times[n // 2]
        row = {'gpus': world, 'batch_size': batch_size, 'ms_per_step': ms, 'rows_per_s': 1000 * batch_size / ms,
               'communication': communication(step, ms) if device.type == 'cuda' else None}
        one = next((r for r in table['rows'] if r['gpus'] == 1), row)
        row['ratio'] = row['rows_per_s'] / one['rows_per_s']
        table['rows'] = [r for r in table['rows'] if (r['gpus'], r['batch_size']) != (world, batch_size)] + [row]
        if rank == 0:
            print(row)
    if rank == 0:
        write_json(path, table)

def main(cfg):
    check(cfg)
    n = cfg.bench_steps
    device, dtype, compile = machine(cfg.device, cfg.dtype, cfg.compile)
    c = resolve(cfg, {'vocab_size': cfg.vocab_size, 'block_size': cfg.block_size})
    c['max_iters'] = WARMUP + n + PROFILED
    name = os.path.basename(cfg.files[-1]).removesuffix('.py') if cfg.files else 'default'
    with memory_errors('a lower --batch_size needs less, and is another benchmark'):
        if cfg.scaling:
            return scaling_rows(c, n, f'out/bench/{name}_scaling.json', device, dtype, compile)
        corpus, batches = random_rows(c, device)
        model = build(c, torch.Generator().manual_seed(0)).to(device)
        clock = time.perf_counter()
        step = our_step(model, c, corpus, batches, dtype, compile)
        start = time.perf_counter() - clock                 # the compiler's import is part of the first step
        times, first = timed(step, n, device)
        rate = matmul_rate(device, dtype)
        model = build(c, torch.Generator().manual_seed(0)).to(device)
        plain, _ = timed(plain_step(model, c, corpus, batches, dtype), n, device)

    ms = times[n // 2]
    n_parameters = sum(p.numel() for p in model.parameters())
    result = {
        **versions(device),
        'config': name,
        'dtype': dtype,
        'compiled': compile,
        'parameters': n_parameters,
        'first_step_s': start + first / 1000,
        'ms_per_step': ms,
        'ms_spread': [times[n // 10], times[-1 - n // 10]],
        'mfu': step_flops(c, n_parameters) / ms / 1e9 / rate,
        'matmul_tflops': rate,
        'reference_ms': plain[n // 2],
        'ratio': plain[n // 2] / ms}
    for key, value in result.items():
        print(f'{key:16s} {value}')
    write_json(f'out/bench/{name}.json', result)

if __name__ == '__main__':
    command(main, __file__, stages=SCRIPTS)
