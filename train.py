"""
Train one condition: the same rows, shuffled or topic by topic. The defaults are Run 1 of the log, MHA shuffled.

Reads data_dir/seed<k>/ (data_synth.py config/run1.py makes it). Writes config.json, log.jsonl and ckpt.pt into
out_dir/<condition>/seed<k>/; the same command resumes a stopped run.

    python train.py config/mha_topic.py --max_iters=100
    torchrun --nproc_per_node=4 train.py config/mha_topic.py        # four GPUs
"""
import contextlib
import functools
import io
import json
import math
import time
from os.path import exists

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import shards
from configurator import block, command
from machine import machine, memory_errors, processes, progress, versions
from model import Block, Qwen3, build, load, load_weights, read_checkpoint
from optim import optimizers
from runs import append_log, columns, locked, open_run, read_config, read_log, run_folder, write_bytes, write_text

# -----------------------------------------------------------------------------
# config

data_dir = 'data/run1'      # dataset; its subfolder seed<k> is read where there is one
out_dir = 'out/single'      # the run goes to out_dir/<condition>/seed<k> ...
run = ''                    # ... or to this folder
seed = 0                    # of dataset, initialisation and order [0, 2**63)
repeat = 0                  # 1: another run with the same settings, whose distance is that of rounding [0, 1]
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one
dtype = ''                  # float32 or bfloat16 (autocast); '' = bfloat16 on cuda, float32 on cpu
compile: bool = None        # torch.compile; none = with cuda, from a thousand steps on
# model
n_layer = 8                 # blocks [1, 2**31)
n_head = 8                  # query heads [1, 2**31)
n_kv_head: int = None       # key-value heads; none = n_head (MHA), fewer = GQA [1, 2**31)
n_embd = 512                # width of the residual stream [1, 2**31)
head_dim = 64               # width of a head; need not be n_embd / n_head [2, 2**31)
mlp_hidden = 1376           # width of the SwiGLU [1, 2**31)
rope = True                 # rotary positions; false = trained without any from the start
rope_theta = 1e6            # base of the rotary frequencies (0, inf)
# optimization
batch_size = 64             # rows a step, over all processes and micro-batches [1, 2**31)
grad_accum = 1              # micro-batches a step is cut into: less memory, the same mathematics [1, 2**31)
max_iters = 10_000          # steps [1, 2**31)
warmup_iters = 500          # linear warm-up, at most a twentieth of the steps; then cosine to zero [0, 2**31)
muon_lr = 0.02              # peak rate of Muon: every 2D matrix of the blocks [0, inf)
adam_lr = 3e-4              # peak rate of AdamW: embedding and norm gains [0, inf)
weight_decay = 0.01         # of both, decoupled: a step takes this times its rate off a weight [0, inf)
grad_clip = 1.0             # largest norm of the whole gradient; 0 = off [0, inf)
# order
order = 'shuffled'          # a name in ORDERS below: shuffled, reshuffled, topic, pseudo
order_seed: int = None      # of reshuffled and pseudo: another order of the same rows; none = seed [0, 2**63)
cycles = 1                  # passes over the topics in an epoch; 1 = the log's, large = nearly shuffled [1, 2**31)
cooldown = 0.0              # last fraction of the steps that is shuffled, the same rows in every arm [0, 1]
# log
eval_interval = 500         # steps between evaluations, each followed by a checkpoint [1, 2**31)
eval_rows = 2000            # validation rows, the first ones [1, 2**31)
log_interval = 10           # steps between lines of log.jsonl [1, 2**31)

RAISE_GRAD_ACCUM = 'a higher --grad_accum (now {grad_accum}, of {batch_size} rows) needs less and resumes the run'

# -----------------------------------------------------------------------------
# order: every arm of a seed reads the same rows in each epoch; the arm decides only when

def as_drawn(rows, labels, rng):
    return rows

def shuffled_again(rows, labels, rng):
    return rng.permutation(rows)

def by_topic(rows, labels, rng):
    return rows[np.argsort(labels[rows], kind='stable')]

def by_pseudo_topic(rows, labels, rng):
    return by_topic(rows, rng.permutation(labels), rng)     # blocks of the same sizes that mean nothing

# name -> rows in order, from those of a part of an epoch as they were drawn [n], the dominant topics of all rows [N],
# and a generator that begins anew for each part: a pseudo-topic has the same rows in all of them
ORDERS = {'shuffled': as_drawn, 'reshuffled': shuffled_again, 'topic': by_topic, 'pseudo': by_pseudo_topic}

def row_order(labels, n_rows, order='shuffled', cycles=1, cooldown_rows=0, seed=0, stream=0, order_seed=None):
    """The rows that training reads, in order: int64 [n_rows]. labels: dominant topic of each row of the dataset [N].
    First every epoch is a fresh permutation of all rows, the last one cut to what is needed, by (seed, stream) alone.
    Then, up to the cooldown, each epoch is cut into `cycles` equal parts, which ORDERS[order] puts in order. Labels are
    renumbered before that: each seed begins with another topic. order_seed: None is seed."""
    N = len(labels)
    rng = np.random.default_rng([seed, stream])
    rows = np.concatenate([rng.permutation(N) for _ in range(n_rows // N + 1)])[:n_rows]
    labels = (labels - seed) % (labels.max() + 1)
    own_seed = seed if order_seed is None else order_seed
    to_sort = rows[:n_rows - cooldown_rows]
    for start in range(0, len(to_sort), N):
        for part in np.array_split(to_sort[start:start + N], cycles):        # views of `rows`
            part[:] = ORDERS[order](part, labels, np.random.default_rng([own_seed, stream, 1]))
    return rows

def count_topics(topics, n_topics):
    """Tokens of each topic in each row [N, n_topics]; topics: [N, T]. The largest is the row's dominant topic."""
    return np.stack([(topics == k).sum(1) for k in range(n_topics)], 1)

# -----------------------------------------------------------------------------
# the step

def lr_scale(step, c):
    """Linear warm-up over min(warmup_iters, max_iters // 20) steps, then cosine to zero at max_iters."""
    max_iters = c['max_iters']
    warmup = min(c['warmup_iters'], max_iters // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (max_iters - warmup)))

def compiled(model):
    """The model's losses, compiled once for all models of its shape, and its blocks, the same code, once for all."""
    import torch._dynamo                                    # only here: they take a while
    import torch._inductor.config
    torch._dynamo.config.recompile_limit = 64               # an experiment has more shapes than the default of 8
    torch._inductor.config.triton.autotune_pointwise = False    # seconds of the first step, nothing in the others
    return functools.partial(
        model, embed=torch.compile(Qwen3.embed), call_block=torch.compile(Block.forward),
        losses=torch.compile(Qwen3.losses, options={'online_softmax': False}))   # faster without, here

def training_step(model, loss_of, muon, adamw, c, corpus, batches, start, dtype):
    """(step, loss_sum): a function that makes an optimizer step, and the sum [] of its mean losses. All that it reads
    is on the device: nothing waits for the host, and on a GPU a step is a CUDA graph. loss_of: the model or what
    `compiled` made of it. corpus: int32 [N, block_size + 1]. batches: its rows, [max_iters, grad_accum, micro]."""
    device = corpus.device
    _, world = processes()
    scales = [lr_scale(s, c) for s in range(c['max_iters'])]
    scales = torch.tensor(scales, device=device)            # [max_iters]
    now = torch.tensor([start], device=device)              # an index without dimensions would be read by the host
    loss_sum = torch.zeros((), device=device)

    def step():
        for rows in batches[now][0]:
            x = corpus[rows].long()                                                      # [micro, block_size + 1]
            with autocast(device, dtype):
                loss = loss_of(x[:, :-1], x[:, 1:]).mean() / (c['grad_accum'] * world)
            loss.backward()
            loss_sum.add_(loss.detach())
        # the sum over the processes: each loss was already divided by their number
        norms = torch._foreach_norm(muon.take_gradients(), dtype=torch.float32)
        squares = torch.stack(norms).square().sum()
        flat = torch.cat([squares[None], *[p.grad.flatten() for p in adamw.params]])
        if world > 1:
            dist.all_reduce(flat)
        squares, gains = flat[0], flat[1:]
        # as torch.nn.utils.clip_grad_norm_, the norm in fp32; Muon multiplies by `clip` itself
        norm = (squares + gains.norm().square()).sqrt()
        clip = ((c['grad_clip'] or math.inf) / (norm + 1e-6)).clamp(max=1)
        scale = scales[now][0]
        muon.step(scale, clip)
        adamw.step(gains * clip, scale)
        model.zero_grad(set_to_none=True)
        now.add_(1)

    if device.type == 'cuda':
        return functools.partial(next, graphed(step)), loss_sum
    return step, loss_sum

def graphed(step):
    """Makes a step at each `next`: three as they are, which compiles; then one CUDA graph, a launch for all kernels."""
    side = torch.cuda.Stream()
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        yield
    graph = torch.cuda.CUDAGraph()
    # a stream of its own: by default that of the first GPU that ever captured; NCCL's thread may go on meanwhile
    with torch.cuda.graph(graph, stream=side, capture_error_mode='thread_local'):
        step()
    while True:
        graph.replay()
        yield

@contextlib.contextmanager
def autocast(device, dtype):
    """bf16 products where dtype says so; on a GPU the attention kernel of cuDNN before that of FlashAttention-2."""
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True), torch.autocast(device.type, torch.bfloat16, dtype == 'bfloat16'):
        yield

# -----------------------------------------------------------------------------
# the training loop, for train.py and drope.py alike

def micro_batch(c, world):
    """Rows of a micro-batch of one process."""
    rows, rest = divmod(c['batch_size'], c['grad_accum'] * world)
    if rest or not rows:
        raise SystemExit(f'batch_size = {c["batch_size"]}: not divisible by grad_accum = {c["grad_accum"]} x {world}')
    return rows

def evaluate(model, loss_of, tokens, micro, dtype):
    """Mean nats over validation rows [N, block_size + 1]; draws nothing. loss_of, the model or what `compiled` made of
    it, knows batches of `micro` rows with gradients: others it would compile anew."""
    rank, world = processes()
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for x in tokens[rank::world].split(micro):
        f = loss_of if len(x) == micro else model
        with autocast(tokens.device, dtype):
            losses = f(x[:, :-1], x[:, 1:]).detach()
        total += losses.double().sum()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / tokens[:, 1:].numel()

def save_checkpoint(folder, model, muon, adamw, step, rows_digest):
    """Atomic: a kill leaves the old checkpoint or the new one. Weights in fp32."""
    weights = {name: muon.master.get(p, p).detach() for name, p in model.named_parameters()}
    momentum = [stack.momentum[:len(stack.params)] for stack in muon.stacks]
    file = io.BytesIO()
    torch.save({
        'model': weights, 'step': step, 'rows': rows_digest, 'rng': torch.get_rng_state(),
        'optimizer': {'muon': {'momentum': momentum}, 'adamw': adamw.state}}, file)
    write_bytes(f'{folder}/ckpt.pt', file.getbuffer())

def resume(folder, model, device, rows_digest):
    """The checkpoint of a run folder, its weights put into the model; None where there is none yet."""
    if not exists(f'{folder}/ckpt.pt'):
        return None
    ckpt = read_checkpoint(folder, device)
    if ckpt.get('rows') != rows_digest:
        raise SystemExit(f'{folder}: was trained on rows in another order; delete it and train again')
    load_weights(model, ckpt['model'], folder)
    torch.set_rng_state(ckpt['rng'].cpu())
    return ckpt

def start_log(folder, ckpt, device):
    """Begin log.jsonl, or cut it to the checkpoint, which a crash may be past. Returns the seconds it has counted."""
    kept = [record for record in read_log(folder) if ckpt and record['step'] <= ckpt['step']]
    lines = [json.dumps(record) + '\n' for record in [versions(device), *kept]]
    write_text(f'{folder}/log.jsonl', ''.join(lines))
    return kept[-1]['seconds'] if kept else 0.0

def log_line(folder, c, step, loss, val_loss, tok_s, counts, seconds):
    """Add a line to log.jsonl. counts: tokens of each topic in the rows read since the last line [rows, n_topics]."""
    record = {
        'step': step, 'loss': loss if step else None, 'val_loss': val_loss,
        'lr': c['muon_lr'] * lr_scale(step - 1, c) if step else 0.0,
        'tok_s': round(tok_s), 'seconds': round(seconds, 2),
        'topics': np.bincount(counts.argmax(1), minlength=c['n_topics']).tolist(),
        'tokens': counts.sum(0).tolist()}
    append_log(folder, record)

def fit(model, c, data, folder, where, stream=0):
    """Train `model` on a dataset: leaves config.json, log.jsonl and ckpt.pt in `folder`, resumes from a ckpt.pt there.
    c: the run's config. data: shards.read(...). where: (device, dtype, compile) of `machine`. stream: of row_order."""
    device, dtype, compile = where
    c = c | {'compile': compile}
    rank, world = processes()
    max_iters, batch_size = c['max_iters'], c['batch_size']
    micro = micro_batch(c, world)
    if rank == 0:
        open_run(folder, c)
    if world > 1:
        dist.barrier()                                      # the others wait for the folder

    # ---- the rows of all steps; weights and optimizers, from the checkpoint where there is one
    counts = count_topics(data.train_topics, c['n_topics'])
    cooldown = round(c['cooldown'] * max_iters) * batch_size
    how = c['order'], c['cycles'], cooldown, c['seed'], stream, c.get('order_seed')
    rows = row_order(counts.argmax(1), max_iters * batch_size, *how)
    rows_digest = shards.digest(rows)
    ckpt = resume(folder, model, device, rows_digest)
    start = ckpt['step'] if ckpt else 0
    if ckpt and start == max_iters:
        print(f'{folder}: finished, {max_iters} steps')
        return
    muon, adamw = optimizers(model, c, dtype, compile, ckpt)

    # ---- the corpus lives on the device and is indexed there
    corpus = torch.tensor(data.train, dtype=torch.int32, device=device)      # [N, block_size + 1]
    val = torch.tensor(data.val[:c['eval_rows']], dtype=torch.int64, device=device)
    batches = torch.from_numpy(rows).to(device).view(max_iters, c['grad_accum'], world, micro)[:, :, rank]
    loss_of = compiled(model) if compile else model
    one_step, loss_sum = training_step(model, loss_of, muon, adamw, c, corpus, batches, start, dtype)

    # ---- the steps
    began = clock = time.time()
    if rank == 0:
        began -= start_log(folder, ckpt, device)            # a resumed run goes on counting
    logged = start                                          # the step of the last line
    bar = progress(total=max_iters, initial=start, desc=columns(c)['condition'], unit='step')
    try:
        for step in range(start, max_iters + 1):
            evaluating = step % c['eval_interval'] == 0 or step == max_iters
            if (evaluating or step % c['log_interval'] == 0) and (step > start or not ckpt):
                if world > 1:
                    dist.all_reduce(loss_sum)
                loss = loss_sum.item() / max(step - logged, 1)
                tok_s = (step - logged) * batch_size * c['block_size'] / max(time.time() - clock, 1e-9)
                val_loss = evaluate(model, loss_of, val, micro, dtype) if evaluating else None
                if not math.isfinite(loss + (val_loss or 0)):
                    raise SystemExit(f'{folder}: the loss is not finite at step {step}; the last checkpoint is kept. '
                                     'Try a lower --muon_lr or --adam_lr in a new run folder')
                if rank == 0:
                    read = rows[logged * batch_size:step * batch_size]
                    log_line(folder, c, step, loss, val_loss, tok_s, counts[read], time.time() - began)
                    bar.set_postfix_str(f'loss {loss:.4f}, {tok_s:,.0f} tokens/s')
                if evaluating:
                    muon.gather('master', 'momentum')
                if rank == 0 and evaluating:
                    save_checkpoint(folder, model, muon, adamw, step, rows_digest)
                    if bar.disable:                         # no terminal: a line now and then
                        print(f'{folder}: step {step} of {max_iters}, val loss {val_loss:.4f}', flush=True)
                loss_sum.zero_()
                logged, clock = step, time.time()
            if step < max_iters:
                one_step()
                bar.update()
    except KeyboardInterrupt:
        raise SystemExit(f'\n{folder}: stopped at step {step}; the same command resumes it from the last checkpoint')
    finally:
        bar.close()
    if rank == 0:
        print(f'{folder}: val loss {val_loss:.4f} nats after {max_iters} steps')
    if world > 1:
        dist.barrier()                                      # leave together: a process that exits early may abort

# -----------------------------------------------------------------------------
# one condition

def data_folder(data_dir, seed):
    """data_dir/seed<k>, as micro-languages are kept, or data_dir itself where it is a dataset (your own tokens)."""
    return data_dir if exists(f'{data_dir}/meta.json') else f'{data_dir}/seed{seed}'

def resolve(cfg, meta):
    """The flat config of a run, as config.json keeps it: this script's keys, and the dataset's parameters."""
    c = {k: getattr(cfg, k) for k in block(__file__)}
    c['n_kv_head'] = cfg.n_kv_head or cfg.n_head
    own = {'data_seed': meta.get('seed'), 'parent': None, 'recal_steps': None, 'keep_rope': None}
    return shards.parameters(meta) | c | own

def read_data(wanted, who):
    """The dataset that settings name, a run's config or a command's; one line if it was built with others by now."""
    data = shards.read(data_folder(wanted['data_dir'], wanted['seed']))
    there = shards.parameters(data.meta)
    for key, value in wanted.items():                       # seed and eval_rows are the run's own
        if key not in (*block(__file__), 'source', 'embedder') and there.get(key, value) != value:
            raise SystemExit(f'{who}: wants another dataset than {data.folder} is ({key} = {there[key]!r} there, here '
                             f'{value!r}); make that dataset again, or choose another data_dir or run')
    return data

def open_finished(run, device):
    """A finished run folder, for whatever looks into its model: (config, model in eval mode, dataset, device)."""
    c = read_config(run)
    device, _, _ = machine(device)
    return c, load(run, device), read_data(c, run), device

def check(cfg):
    """Stops with one line at the first setting that can't work."""
    if cfg.order not in ORDERS:
        raise SystemExit(f'order = {cfg.order}: one of {", ".join(ORDERS)}')

def main(cfg):
    check(cfg)
    where = machine(cfg.device, cfg.dtype, cfg.compile, cfg.max_iters)
    data = read_data(getattr(cfg, 'overrides', {}) | {'data_dir': cfg.data_dir, 'seed': cfg.seed}, 'train.py')
    c = resolve(cfg, data.meta)
    folder = cfg.run or run_folder(cfg.out_dir, c)
    with memory_errors(RAISE_GRAD_ACCUM.format(**c)), locked(folder, processes()[0]):
        model = build(c).to(where[0])
        fit(model, c, data, folder, where)

if __name__ == '__main__':
    command(main, __file__)
