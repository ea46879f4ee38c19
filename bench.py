"""
How fast a config trains: the step of train.py beside the same step in plain PyTorch, in one run.

Reads nothing but the config: random tokens, no dataset. Writes out/bench/<config>.json.

    python bench.py config/run1.py                              # GPU
    python bench.py config/demo.py --bench_steps=20             # a CPU will do

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
from machine import machine, memory_errors, versions
from model import build
from runs import write_json
from train import check, compiled, lr_scale, micro_batch, optimizers, resolve, split_parameters, training_step

# -----------------------------------------------------------------------------
# config

bench_steps = 60            # timed steps, after warm-up [10, 2**31)

# -----------------------------------------------------------------------------

WARMUP = 6                  # steps before those that are timed
N_ROWS = 4096               # rows of random tokens

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
    """Milliseconds of n calls of `step`, each waited for, after a warm-up; sorted."""
    times = []
    for _ in range(WARMUP + n):
        clock = time.perf_counter()
        step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - clock))
    return sorted(times[WARMUP:])

def matmul_rate(device, dtype):
    """TFLOP/s of large products of random normals: 8192^3 on a GPU, 1024^3 on a CPU."""
    n = 8192 if device.type == 'cuda' else 1024
    g = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype), generator=g)

    def products():
        for _ in range(10):                                 # as in a step: waited for once
            a @ b

    times = timed(products, 11, device)
    return 10 * 2 * n ** 3 / times[5] / 1e9

def main(cfg):
    check(cfg)
    n = cfg.bench_steps
    device, dtype, compile = machine(cfg.device, cfg.dtype, cfg.compile)
    c = resolve(cfg, {'vocab_size': cfg.vocab_size, 'block_size': cfg.block_size})
    c['max_iters'] = n + WARMUP
    g = torch.Generator().manual_seed(c['seed'])
    corpus = torch.randint(c['vocab_size'], (N_ROWS, c['block_size'] + 1), generator=g, dtype=torch.int32).to(device)
    batches = torch.randint(N_ROWS, (c['max_iters'], c['grad_accum'], micro_batch(c)), generator=g).to(device)

    with memory_errors('a lower --batch_size needs less, and is another benchmark'):
        model = build(c, g).to(device)
        loss_of = compiled(model) if compile else model
        muon, adamw = optimizers(model, c, dtype, compile)
        step, _ = training_step(model, loss_of, muon, adamw, c, corpus, batches, 0, dtype)
        times = timed(step, n, device)
        rate = matmul_rate(device, dtype)
        step = plain_step(build(c, g).to(device), c, corpus, batches, dtype)
        plain_ms = timed(step, n, device)[n // 2]

    name = os.path.basename(cfg.files[-1]).removesuffix('.py') if cfg.files else 'default'
    ms = times[n // 2]
    n_parameters = sum(p.numel() for p in model.parameters())
    result = {
        **versions(device),
        'config': name,
        'dtype': dtype,
        'compiled': compile,
        'parameters': n_parameters,
        'ms_per_step': ms,
        'ms_spread': [times[n // 10], times[-1 - n // 10]],
        'mfu': step_flops(c, n_parameters) / ms / 1e9 / rate,
        'matmul_tflops': rate,
        'reference_ms': plain_ms,
        'ratio': plain_ms / ms}
    for key, value in result.items():
        print(f'{key:16s} {value}')
    write_json(f'out/bench/{name}.json', result)

if __name__ == '__main__':
    command(main, __file__, stages=SCRIPTS)
