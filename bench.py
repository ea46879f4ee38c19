"""
How fast a config trains: the step of train.py beside the same step in plain PyTorch, in one run.

    python bench.py config/run1.py
    python bench.py config/run1.py --profile=True           # and the kernels by time
    python bench.py config/demo.py --stages=True            # and the time of each stage of an experiment

Random tokens, no dataset. Times are medians over bench_steps steps, with the 10th and 90th percentile; compilation is
apart, and peak memory is that of the steps, without an evaluation. MFU: the products that a step cannot do without,
6 N a token (N parameters, the tied matrix once) and 6 n_layer n_head head_dim block_size for causal attention, over
the step's time, over the rate at which the device multiplies two large random matrices of the same type. Writes
out/bench/<config>.json.
"""
import time

_began = time.time()                                        # before torch is imported: start-up is measured too

import itertools
import os
import resource
import tempfile
from types import SimpleNamespace

import torch
from tqdm import tqdm

import shards
from configurator import SCRIPTS, block, configure
from model import build
from train import (check, compiled, lr_scale, machine, memory_errors, optimizers, split_parameters, training_step,
                   versions)

# -----------------------------------------------------------------------------
# config

bench_steps = 60            # timed steps, after warm-up
reference = True            # also time plain PyTorch: eager, torch.optim.Muon
stages = False              # also time each stage of an experiment, with bench_steps steps a run
profile = False             # also write the kernels by time to out/bench/<config>_kernels.txt

# -----------------------------------------------------------------------------

def plain_step(model, c, corpus, batches, dtype):
    """The step as one would write it first: eager, torch's own Muon, the schedule in Python. Arguments as in
    train.training_step; returns a function that makes a step and returns the loss in nats."""
    matrices, others = split_parameters(model)
    muon = torch.optim.Muon(matrices, lr=c['muon_lr'], momentum=0.95, nesterov=True, weight_decay=c['weight_decay'])
    adamw = torch.optim.AdamW(others, lr=c['adam_lr'], betas=(0.9, 0.95), weight_decay=c['weight_decay'])
    count = itertools.count()
    def step():
        n, total = next(count), 0
        for rows in batches[n]:
            x = corpus[rows].long()
            with torch.autocast(corpus.device.type, torch.bfloat16, dtype == 'bfloat16'):
                loss = model(x[:, :-1], x[:, 1:]).mean() / c['grad_accum']
            loss.backward()
            total = total + loss.detach()
        if c['grad_clip']:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c['grad_clip'])
        scale = lr_scale(n, c['max_iters'], c['warmup_iters'])
        for optimizer, lr in ((muon, c['muon_lr']), (adamw, c['adam_lr'])):
            optimizer.param_groups[0]['lr'] = lr * scale
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return total
    return step

def step_flops(c, n_parameters):
    """Floating-point operations of the products of a step, forward and backward."""
    attention = c['n_layer'] * c['n_head'] * c['head_dim'] * c['block_size']
    return c['batch_size'] * c['block_size'] * 6 * (n_parameters + attention)

def timed(step, n, device, desc):
    """Milliseconds of n calls of `step`, sorted."""
    if device.type != 'cuda':
        times = []
        for _ in tqdm(range(n), desc, disable=None, leave=False):
            clock = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - clock))
        return sorted(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in tqdm(events[1:], desc, disable=None, leave=False):
        step()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))

def matmul_rate(device, dtype):
    """TFLOP/s of a large product of random normals: 8192^3 on a GPU, 2048^3 on a CPU."""
    n = 8192 if device.type == 'cuda' else 2048
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=g).to(device, getattr(torch, dtype)) for _ in range(2))
    timed(lambda: a @ b, 3, device, 'product')
    return 2 * n ** 3 / timed(lambda: a @ b, 15, device, 'product')[7] / 1e9

def kernels(step, path):
    """Write the GPU's (or the CPU's) kernels of a step, by time."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as p:
        for _ in range(3):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    rows = [((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 3e3, e.count / 3, e.key)
            for e in p.key_averages()]
    rows = sorted((r for r in rows if r[0] > 0), reverse=True)
    shards.write_text(path, f'{sum(r[0] for r in rows):9.3f} ms in all, of a step\n' + ''.join(
        f'{ms:9.4f} ms {count:7.1f} x {name[:120]}\n' for ms, count, name in rows[:60]))

def time_stages(cfg):
    """Seconds of each stage, with the config's data and bench_steps steps a run, in a folder that is deleted."""
    import analyze
    import data_synth
    import drope
    import plot
    import train
    from run_experiment import stage, train_stage
    seconds = {}
    def clock(label, main, *args):
        start = time.time()
        result = main(*args)
        seconds[label] = round(time.time() - start, 2)
        return result
    with tempfile.TemporaryDirectory() as folder:
        n = cfg.bench_steps
        cfg = SimpleNamespace(**vars(cfg) | {'data_dir': f'{folder}/data', 'out_dir': f'{folder}/out', 'max_iters': n,
                                             'recal_iters': (n,), 'eval_interval': n})
        clock('data, a seed', data_synth.main, stage(cfg, 'data_synth.py', seed=0))
        run = clock(f'train, {n} steps', train.main, train_stage(cfg, cfg.arms[0], 0))
        another = train_stage(cfg, cfg.arms[0], 0)          # of the same shape: nothing is compiled again
        another.order = 'pseudo'
        clock(f'train, {n} steps, another arm', train.main, another)
        for label, keep in (('kept', True), ('drope', False)):
            at = stage(cfg, 'drope.py', run=run, keep_rope=keep)
            clock(f'{label}, {n} steps', drope.recalibrate, at, n)
        clock('analyze, a run', analyze.main, stage(cfg, 'analyze.py', run=run, causal=True))
        clock('figures', plot.main, stage(cfg, 'plot.py', paths=[cfg.out_dir]))
    return seconds

def main(cfg):
    check(cfg)
    if cfg.bench_steps < 10:
        raise SystemExit(f'bench_steps = {cfg.bench_steps}: at least 10 for a median with a spread')
    device, dtype, compile = machine(cfg.device, cfg.dtype, cfg.compile)
    name = os.path.basename(cfg.files[-1]).removesuffix('.py') if cfg.files else 'default'
    c = {k: getattr(cfg, k) for k in (*block('train.py'), 'vocab_size', 'block_size')}
    c['n_kv_head'] = cfg.n_head if cfg.n_kv_head is None else cfg.n_kv_head
    c['max_iters'], warmup = 2 * cfg.bench_steps + 20, 6
    micro, rest = divmod(c['batch_size'], c['grad_accum'])
    if rest:
        raise SystemExit(f'batch_size = {c["batch_size"]} is not divisible by grad_accum = {c["grad_accum"]}')
    generator = torch.Generator().manual_seed(c['seed'])
    corpus = torch.randint(c['vocab_size'], (4096, c['block_size'] + 1), generator=generator, dtype=torch.int32)
    batches = torch.randint(4096, (c['max_iters'], c['grad_accum'], micro), generator=generator)
    corpus, batches = corpus.to(device), batches.to(device)
    fresh = lambda: build(c, torch.Generator().manual_seed(c['seed'])).to(device)
    out = os.path.join('out', 'bench', name)
    os.makedirs(os.path.dirname(out), exist_ok=True)

    with memory_errors('a lower --batch_size needs less, and is another benchmark'):
        clock, startup = time.time(), time.time() - _began
        model = fresh()
        loss_of, both = compiled(model) if compile else model, optimizers(model, c, dtype, compile)
        step, loss_sum = training_step(model, loss_of, *both, c, corpus, batches, 0, dtype,
                                       compile and device.type == 'cuda')
        step()
        loss_sum.item()                                     # waits for the device
        compile_s = time.time() - clock
        for _ in range(warmup):
            step()
        rate = matmul_rate(device, dtype)
        ours = timed(step, cfg.bench_steps, device, 'train.py')
        peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cfg.profile:
            kernels(step, f'{out}_kernels.txt')
        n_parameters = sum(p.numel() for p in model.parameters())
        del model, step
        plain = None
        if cfg.reference:
            step = plain_step(fresh(), c, corpus, batches, dtype)
            for _ in range(warmup):
                step()
            plain = timed(step, cfg.bench_steps, device, 'plain PyTorch')

    median = lambda times: times[len(times) // 2]
    ms = median(ours)
    result = {
        'config': name, **versions(device), 'dtype': dtype, 'compiled': compile, 'parameters': n_parameters,
        'tokens_per_step': c['batch_size'] * c['block_size'], 'steps': cfg.bench_steps, 'matmul_tflops': round(rate, 2),
        'ms_per_step': round(ms, 3), 'ms_spread': [round(ours[len(ours) // 10], 3), round(ours[-len(ours) // 10], 3)],
        'tokens_per_s': round(1e3 * c['batch_size'] * c['block_size'] / ms),
        'mfu': round(step_flops(c, n_parameters) / ms / 1e9 / rate, 4),
        'reference_ms': plain and round(median(plain), 3), 'ratio': plain and round(median(plain) / ms, 2),
        'startup_s': round(startup, 1), 'compile_s': round(compile_s, 1), 'peak_gib': round(peak / 2**30, 2),
        'stages_s': time_stages(cfg) if cfg.stages else None}
    shards.write_json(f'{out}.json', result)
    rows = {'device': f'{result["device"]}, torch {result["versions"]["torch"]}, {dtype}',
            'model': f'{n_parameters / 1e6:.1f}M parameters, {c["batch_size"]} x {c["block_size"]} tokens a step',
            'ms/step': f'{ms:.2f}  [{result["ms_spread"][0]:.2f}, {result["ms_spread"][1]:.2f}]',
            'tokens/s': f'{result["tokens_per_s"]:,}', 'MFU': f'{result["mfu"]:.1%} of {rate:.1f} TFLOP/s',
            'plain PyTorch': f'{median(plain):.2f} ms/step, ratio {result["ratio"]:.2f}' if plain else 'not timed',
            'first step': f'{compile_s:.1f} s, after {startup:.1f} s of start-up',
            'peak memory': f'{result["peak_gib"]} GiB',
            **{k: f'{v:.1f} s' for k, v in (result['stages_s'] or {}).items()}}
    print('\n'.join(f'{k:24s} {v}' for k, v in rows.items()))
    print(f'written to {out}.json')
    return result

if __name__ == '__main__':
    main(configure(__file__, stages=SCRIPTS))
