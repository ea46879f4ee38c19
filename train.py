"""
Train one condition: the same rows, shuffled or topic by topic.

    python data_synth.py config/run1.py                     # the dataset, once
    python train.py config/mha_topic.py --max_iters=100
    torchrun --nproc_per_node=4 train.py config/mha_topic.py

Writes config.json, log.jsonl and ckpt.pt into out_dir/<condition>/seed<k>/. The same command resumes a stopped run.
The defaults are Run 1 of the log, MHA shuffled.
"""
import atexit
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import shards
from configurator import at_least, block, configure
from model import build, load_weights, read_checkpoint, read_config

# -----------------------------------------------------------------------------
# config

data_dir = 'data/run1'      # dataset; its subfolder seed<k> is read where there is one
out_dir = 'out/single'      # the run goes to out_dir/<condition>/seed<k> ...
run = ''                    # ... or to this folder
seed = 0                    # of dataset, initialisation and order
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one
dtype = ''                  # float32 or bfloat16 (autocast); '' = bfloat16 on cuda, float32 on cpu
compile: bool = None        # torch.compile; none = on with cuda, off on cpu
# model
n_layer = 8                 # blocks
n_head = 8                  # query heads
n_kv_head: int = None       # key-value heads; none = n_head (MHA), fewer = GQA
n_embd = 512                # width of the residual stream
head_dim = 64               # width of a head; need not be n_embd / n_head
mlp_hidden = 1376           # width of the SwiGLU
rope = True                 # rotary positions; false = trained without any from the start
rope_theta = 1e6            # base of the rotary frequencies
# optimization
batch_size = 64             # rows a step, over all processes and micro-batches
grad_accum = 1              # micro-batches a step is cut into: less memory, the same mathematics
max_iters = 10_000          # steps
warmup_iters = 500          # linear warm-up, at most a twentieth of the steps; then cosine to zero
muon_lr = 0.02              # Muon: every 2D matrix of the blocks
adam_lr = 3e-4              # AdamW: embedding and norm gains
weight_decay = 0.01         # both, decoupled
grad_clip = 1.0             # norm of the whole gradient; 0 = off
# order
order = 'shuffled'          # shuffled, topic (sorted by dominant topic) or pseudo (by a random label of equal sizes)
cycles = 1                  # passes over the topics in an epoch; 1 = the log's, large = nearly shuffled
cooldown = 0.0              # last fraction of the steps that is shuffled, the same rows in every arm
# log
eval_interval = 500         # steps between evaluations, each followed by a checkpoint
eval_rows = 2000            # validation rows, the first ones
log_interval = 10           # steps between lines of log.jsonl

# -----------------------------------------------------------------------------
# order: every arm of a seed reads the same rows in each epoch; the arm decides only when

def row_order(labels, n_rows, order='shuffled', cycles=1, cooldown_rows=0, seed=0, stream=0):
    """
    The rows that training reads, in order: int64 [n_rows].

    labels: dominant topic of each row of the dataset [N]. First every epoch is a fresh permutation of all rows, the
    last one cut to what is needed; that sequence depends on (seed, stream) alone. Then, up to the cooldown, each
    epoch's part is cut into `cycles` equal parts, and each part is sorted by label, stably, topics in an order rotated
    by seed. 'pseudo' sorts by a fixed random permutation of the labels: equal sizes, no meaning.
    """
    N = len(labels)
    rng = np.random.default_rng([seed, stream])
    rows = np.concatenate([rng.permutation(N) for _ in range(-(-n_rows // N))] or [np.arange(0)])[:n_rows]
    if order == 'shuffled':
        return rows
    if order == 'pseudo':
        labels = np.random.default_rng([seed, stream, 1]).permutation(labels)
    n_labels = int(labels.max()) + 1
    rank = (labels.astype(np.int64) - seed) % n_labels
    for start in range(0, n_rows - cooldown_rows, N):
        stop = min(start + N, n_rows - cooldown_rows)
        for part in np.array_split(np.arange(start, stop), cycles):
            part_rows = rows[part]
            rows[part] = part_rows[np.argsort(rank[part_rows], kind='stable')]
    return rows

def dominant_topic(topics, n_topics):
    """The most frequent label of each row [N], ties to the lowest. topics: [N, T]."""
    return np.stack([(topics == k).sum(1) for k in range(n_topics)]).argmax(0)

def steps_since(topics, share):
    """Steps since each topic was last seen, before every step: int64 [steps + 1, K]. topics: dominant topics of each
    step's rows [steps, batch]; a topic is seen in a step that has at least half of its `share` [K] of all rows."""
    steps, K = len(topics), len(share)
    seen = np.stack([(topics == k).mean(1) for k in range(K)], 1) >= share / 2                  # [steps, K]
    last = np.maximum.accumulate(np.where(seen, np.arange(1, steps + 1)[:, None], 0), 0)
    return np.arange(steps + 1)[:, None] - np.concatenate([np.zeros((1, K), np.int64), last])

def condition(c):
    """The name of a condition, {mha,gqa}_{order}_{rope,nope}, as in the log's table; the order of training rows that
    hold one segment ends with _pure. c: a config as a dict."""
    sort = {'shuffled': 'shuffled', 'topic': 'topic_ordered', 'pseudo': 'pseudo'}[c['order']]
    if c['order'] != 'shuffled' and c['cycles'] != 1:
        sort = f'{c["order"]}_c{c["cycles"]}'
    if c['order'] != 'shuffled' and c['cooldown']:
        sort += f'_cd{round(100 * c["cooldown"])}'
    if c.get('max_segments') == 1:
        sort += '_pure'
    return f'{"mha" if c["n_kv_head"] == c["n_head"] else "gqa"}_{sort}_{"rope" if c["rope"] else "nope"}'

# -----------------------------------------------------------------------------
# optimizers

def momentum_step(grads, momentum, clip):
    """Nesterov momentum, in place: what Newton-Schulz starts from, bf16 [n, rows, cols] for each shape. Of each shape
    grads has the list of [rows, cols], momentum the stack; clip: a factor [] of all gradients."""
    starts = []
    for grad, m in zip(grads, momentum):
        grad = torch.stack(grad).float() * clip
        m.lerp_(grad, 1 - 0.95)
        x = grad.lerp(m, 0.95).bfloat16()
        starts.append(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))
    return starts

def newton_schulz(x):
    """Five quintic Newton-Schulz steps towards the nearest semi-orthogonal matrix, in bf16. x: [n, rows, cols]
    (Jordan 2024, kellerjordan.github.io/posts/muon; the coefficients and rounding of torch.optim.Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(1) > x.size(2)
    for _ in range(5):
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x

def weight_step(masters, weights, updates, lr, weight_decay):
    """Decay and update the fp32 weights, and the copy of them that the model works with, in place; [n, rows, cols]
    of each shape."""
    for master, its, update in zip(masters, weights, updates):
        rate = lr * math.sqrt(max(1, update.size(1) / update.size(2)))
        master.mul_(1 - lr * weight_decay).sub_(update.float() * rate)
        if its is not master:
            its.copy_(master)

class Muon:
    """
    torch.optim.Muon with the matrices of one shape stacked into one batched product, and nothing that syncs.

    Parameters become views of their stack. dtype: that of the model's matrices and their gradients; the optimizer
    updates fp32 ones (`master`: parameter -> its fp32 weights), as autocast would have them cast at every step.
    """
    def __init__(self, params, lr, weight_decay, dtype=torch.float32, compile=False):
        groups = {}
        for p in params:
            groups.setdefault(p.shape, []).append(p)
        self.lr, self.weight_decay, self.groups, self.master = lr, weight_decay, list(groups.values()), {}
        self.masters = [torch.stack([p.detach() for p in group]) for group in self.groups]
        self.weights = [master.to(dtype) for master in self.masters]     # the same tensor where that is fp32
        self.momentum = [torch.zeros_like(master) for master in self.masters]
        for group, master, weights in zip(self.groups, self.masters, self.weights):
            for p, mine, its in zip(group, master, weights):
                p.data, self.master[p] = its, mine
        fused = (lambda f: torch.compile(f, dynamic=False)) if compile else lambda f: f
        self.momentum_step, self.weight_step = fused(momentum_step), fused(weight_step)

    @torch.no_grad()
    def step(self, scale, clip):
        """scale: what the schedule makes of the rate, clip: what clipping makes of the gradient; fp32 [], on device."""
        starts = self.momentum_step([[p.grad for p in group] for group in self.groups], self.momentum, clip)
        updates = [newton_schulz(x) for x in starts]
        self.weight_step(self.masters, self.weights, updates, self.lr * scale, self.weight_decay)

    def state_dict(self):
        return {'momentum': self.momentum}

    def load_state_dict(self, state):
        for mine, saved in zip(self.momentum, state['momentum'], strict=True):
            mine.copy_(saved)

def split_parameters(model):
    """(the 2D matrices of the blocks, for Muon; the embedding and the norm gains, for AdamW)."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and '.layers.' in name else others).append(p)
    return matrices, others

def optimizers(model, c, dtype, compile):
    """(Muon, AdamW) of a model, with the rates and the decay of its config."""
    matrices, others = split_parameters(model)
    assert {id(p) for p in matrices + others} == {id(p) for p in model.parameters()}
    assert len(matrices) + len(others) == len(list(model.parameters()))     # every parameter in exactly one group
    device = others[0].device                               # a rate on the device changes without the host
    adamw = torch.optim.AdamW(others, lr=torch.tensor(c['adam_lr'], device=device), betas=(0.9, 0.95),
                              weight_decay=c['weight_decay'], fused=True, capturable=device.type == 'cuda')
    # the matrices may be bf16, which saves casting them and their gradients, where gradients are not added up
    bf16 = dtype == 'bfloat16' and c['grad_accum'] == 1 and not dist.is_initialized()
    return Muon(matrices, c['muon_lr'], c['weight_decay'], torch.bfloat16 if bf16 else torch.float32, compile), adamw

def lr_scale(step, max_iters, warmup_iters):
    """Linear warm-up over min(warmup_iters, max_iters // 20) steps, then cosine to zero at max_iters."""
    warmup = min(warmup_iters, max_iters // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (max_iters - warmup)))

# -----------------------------------------------------------------------------
# a run: its folder, its machine

IDENTITY_FREE = {'data_dir', 'out_dir', 'run', 'parent', 'device', 'compile', 'grad_accum'}

def differences(config, there):
    """The keys, sorted, in which two configs describe different runs; where and how fast they ran does not matter."""
    return sorted(k for k in config.keys() | there.keys() if k not in IDENTITY_FREE
                  and json.dumps(config.get(k)) != json.dumps(there.get(k)))

def open_run(folder, config):
    """Write config.json into a new run folder, or check that the run already there has the same settings."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return dist.barrier()                               # the first process does it
    path = os.path.join(folder, 'config.json')
    if os.path.exists(path):
        there = read_config(folder)
        differ = differences(config, there)
        if differ:
            k = differ[0]
            more = f', and {len(differ) - 1} more' if differ[1:] else ''
            raise SystemExit(f'{folder}: holds a run with other settings ({k} = {there.get(k)!r}, here '
                             f'{config.get(k)!r}{more}); delete it or choose another --out_dir=')
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            shards.write_json(path, config)
        except OSError as e:
            raise SystemExit(f'{folder}: cannot write there ({e.strerror}); choose another --out_dir') from None
    if dist.is_initialized():
        dist.barrier()

def machine(device, dtype='', compile=None):
    """(torch.device, dtype, compile) with the automatic choices made, for this process."""
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise SystemExit(f'device = {device}: torch {torch.__version__} sees no CUDA device here')
    if device == 'cuda':
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(device)
    except RuntimeError:
        raise SystemExit(f'device = {device}: not a device; cpu, cuda or cuda:1') from None
    dtype = dtype or ('bfloat16' if device.type == 'cuda' else 'float32')
    if dtype not in ('float32', 'bfloat16'):
        raise SystemExit(f'dtype = {dtype}: float32 or bfloat16')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if 'RANK' in os.environ and not dist.is_initialized():
        cuda = device.type == 'cuda'
        dist.init_process_group('nccl' if cuda else 'gloo', device_id=device if cuda else None)
        atexit.register(dist.destroy_process_group)
    return device, dtype, device.type == 'cuda' if compile is None else compile

def versions(device):
    """What a result depends on: {'device', 'versions'}."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    return {'device': name, 'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                                         'numpy': np.__version__}}

def progress(*args, hidden=False, **kwargs):
    """A progress bar on a terminal; none in the children of an experiment, which shows one for all of them."""
    return tqdm(*args, disable=True if hidden or multiprocessing.parent_process() else None, **kwargs)

RAISE_GRAD_ACCUM = ('a higher --grad_accum (now {grad_accum}, of batch_size = {batch_size}) needs less for a step, '
                    'does the same and resumes the run')

@contextlib.contextmanager
def memory_errors(hint):
    """Out of memory, on the GPU or in RAM, as one line that ends with what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:                # torch.OutOfMemoryError is a RuntimeError
        said = any(words in str(e) for words in ('out of memory', 'not enough memory', "can't allocate memory"))
        if not said and not isinstance(e, (torch.OutOfMemoryError, MemoryError)):
            raise
        raise SystemExit(f'out of memory: {hint}') from None

# -----------------------------------------------------------------------------
# the step

def compiled(model):
    """The model as torch.compile makes it: one compilation for all models of its shape, whatever their weights."""
    import torch._dynamo                                    # only here: it takes a while
    import torch._functorch.config
    torch._dynamo.config.recompile_limit = 64               # an experiment has more shapes than the default of 8
    if hasattr(torch._functorch.config, 'autograd_cache_allow_custom_autograd_functions'):
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True    # else model.Products is not
    return torch.compile(model, options={'online_softmax': False})                       # cached. False: faster here

def training_step(model, loss_of, muon, adamw, c, corpus, batches, start, dtype, graph):
    """
    (step, loss_sum): a function without arguments that makes one optimizer step, and the sum [] of its mean losses.

    Whatever a step reads is on the device, its own number and learning rate too: nothing waits for the host, and all
    of it, optimizers included, can be one CUDA graph. corpus: int32 [N, block_size + 1]. batches: rows of it, int64
    [max_iters, grad_accum, micro], those of this process. start: the first step. c: the run's config. loss_of: the
    model, or what `compiled` made of it. graph: capture it.
    """
    device, world = corpus.device, dist.get_world_size() if dist.is_initialized() else 1
    scales = torch.tensor([lr_scale(s, c['max_iters'], c['warmup_iters']) for s in range(c['max_iters'])],
                          device=device)
    now = torch.tensor([start], device=device)              # an index without dimensions would be read by the host
    loss_sum, one = torch.zeros((), device=device), torch.ones((), device=device)
    matrices, others = split_parameters(model)

    def step():
        for rows in batches[now][0]:
            x = corpus[rows].long()                                                      # [micro, block_size + 1]
            with autocast(device, dtype):
                loss = loss_of(x[:, :-1], x[:, 1:]).mean() / (c['grad_accum'] * world)
            loss.backward()
            loss_sum.add_(loss.detach())
        if world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)                     # a sum: the loss was already divided by the processes
        clip, scale = one, scales[now][0]
        if c['grad_clip']:                                  # as torch.nn.utils.clip_grad_norm_, the norm in fp32
            norms = [n for part in (matrices, others)
                     for n in torch._foreach_norm([p.grad for p in part], dtype=torch.float32)]
            clip = (c['grad_clip'] / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
            torch._foreach_mul_([p.grad for p in others], clip)
        adamw.param_groups[0]['lr'].copy_(c['adam_lr'] * scale)
        muon.step(scale, clip)
        adamw.step()
        model.zero_grad(set_to_none=True)
        now.add_(1)

    return (graphed(step) if graph else step), loss_sum

def graphed(step, warmup=3):
    """
    `step` as one CUDA graph: hundreds of kernels for one launch. The first calls run as they are, which compiles them;
    then one is captured, and from there on a call replays it (docs.pytorch.org/docs/stable/notes/cuda.html).
    """
    graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count()
    def call():
        n, stream = next(calls), torch.cuda.current_stream()
        if n < warmup:
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                step()
            return stream.wait_stream(side)
        if n == warmup:
            with torch.cuda.graph(graph):
                step()
        graph.replay()
    return call

@contextlib.contextmanager
def autocast(device, dtype):
    """bf16 products where dtype says so; on a GPU the attention kernel of cuDNN before that of FlashAttention-2."""
    first = [SDPBackend.CUDNN_ATTENTION] if device.type == 'cuda' else []
    backends = [*first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True), torch.autocast(device.type, torch.bfloat16, dtype == 'bfloat16'):
        yield

# -----------------------------------------------------------------------------
# the training loop, for train.py and drope.py alike

def evaluate(model, loss_of, tokens, topics, n_topics, micro, dtype):
    """
    Cross-entropy in nats over validation rows: (mean, [mean over the tokens of each topic]); draws nothing at random.

    tokens, topics: [N, block_size + 1]. loss_of: the model, or what `compiled` made of it: that knows batches of
    `micro` rows with gradients, others it would compile anew.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(2, n_topics, dtype=torch.float64, device=tokens.device)              # losses, tokens
    for batch, z in zip(tokens[rank::world].split(micro), topics[rank::world].split(micro)):
        x, f = batch.long(), loss_of if len(batch) == micro else model
        with autocast(tokens.device, dtype), torch.set_grad_enabled(f is not model):
            losses = f(x[:, :-1], x[:, 1:]).detach().double().flatten()
        label = z[:, 1:].long().flatten()
        total[0].index_add_(0, label, losses)
        total[1].index_add_(0, label, torch.ones_like(losses))
    if world > 1:
        dist.all_reduce(total)
    losses, counts = total.tolist()
    return sum(losses) / sum(counts), [round(x / n, 6) if n else None for x, n in zip(losses, counts)]

def fit(model, c, rows, labels, data, folder, device, dtype, compile):
    """
    Train `model` through `rows`, leaving config.json, log.jsonl and ckpt.pt in `folder`; resumes from a ckpt.pt there.

    c: the run's config as a dict. rows: int64 [max_iters * batch_size], rows of data.train in order (`row_order`).
    labels: the dominant topic of each row of data.train. data: shards.read(...). Returns the last validation loss in
    nats; None where the run was finished already, and in all processes but the first.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    micro, rest = divmod(c['batch_size'], c['grad_accum'] * world)
    if rest:
        raise SystemExit(f'batch_size = {c["batch_size"]} is not divisible by grad_accum x processes '
                         f'= {c["grad_accum"]} x {world}')
    open_run(folder, c)
    max_iters = c['max_iters']
    ckpt_path, log_path = os.path.join(folder, 'ckpt.pt'), os.path.join(folder, 'log.jsonl')
    start, rows_digest, ckpt = 0, shards.digest(rows), None
    if os.path.exists(ckpt_path):
        ckpt = read_checkpoint(folder, device)
        if ckpt.get('rows') != rows_digest:
            raise SystemExit(f'{ckpt_path}: was trained on rows in another order; delete {folder} and train again')
        start = ckpt['step']
        if start == max_iters:
            if rank == 0:
                print(f'{folder}: finished, {max_iters} steps')
            return None
        load_weights(model, ckpt, folder)
        torch.set_rng_state(ckpt['rng'].cpu())
    muon, adamw = optimizers(model, c, dtype, compile)      # takes the weights as they are now
    if ckpt:
        muon.load_state_dict(ckpt['optimizer']['muon'])
        adamw.load_state_dict(ckpt['optimizer']['adamw'])
        adamw.param_groups[0]['capturable'] = device.type == 'cuda'     # it may have been trained elsewhere

    # the corpus lives on the device and is indexed there
    train = torch.from_numpy(data.train.astype(np.int32)).to(device)                     # [N, block_size + 1]
    val, val_topics = (torch.from_numpy(x[:c['eval_rows']].astype(np.int32)).to(device)
                       for x in (data.val, data.val_topics))
    batches = torch.from_numpy(rows).to(device).view(max_iters, c['grad_accum'], world, micro)
    topics_of = labels[rows].reshape(max_iters, c['batch_size'])                         # [max_iters, batch_size]
    since = steps_since(topics_of, np.bincount(labels, minlength=c['n_topics']) / len(labels))
    loss_of, graph = compiled(model) if compile else model, compile and device.type == 'cuda' and world == 1
    one_step, loss_sum = training_step(model, loss_of, muon, adamw, c, train, batches[:, :, rank], start, dtype, graph)

    lines = []                                              # log.jsonl up to the checkpoint; a crash may have gone past
    if os.path.exists(log_path):
        for line in open(log_path):
            with contextlib.suppress(ValueError):           # a kill may have cut the last line
                record = json.loads(line)
                if 'step' not in record or record['step'] <= start > 0:
                    lines.append(record)
    if rank == 0:
        shards.write_text(log_path, ''.join(json.dumps(r) + '\n' for r in lines or [versions(device)]))
    log = open(log_path, 'a') if rank == 0 else None
    before = lines[-1].get('seconds', 0.0) if lines else 0.0
    name = os.path.basename(os.path.dirname(folder)) or folder
    bar = progress(total=max_iters, initial=start, desc=name, unit='step', hidden=rank > 0)
    diverged = (f'{folder}: {{}} is {{}} at step {{}}; the last checkpoint is kept. Try a lower --muon_lr or --adam_lr '
                f'(now {c["muon_lr"]}, {c["adam_lr"]}) in a new run folder')
    logged, val_loss, clock = start, None, time.time()
    began = clock
    try:
        for step in range(start, max_iters + 1):
            last = step == max_iters
            evaluating = step % c['eval_interval'] == 0 or last
            if step > logged and (step % c['log_interval'] == 0 or evaluating) or step == 0:
                if world > 1:
                    dist.all_reduce(loss_sum)
                loss = loss_sum.item() / max(step - logged, 1)
                if not math.isfinite(loss):
                    raise SystemExit(diverged.format('loss', loss, step))
                tok_s = (step - logged) * c['batch_size'] * (train.size(1) - 1) / max(time.time() - clock, 1e-9)
                val_loss, by_topic = None, None
                if evaluating:
                    val_loss, by_topic = evaluate(model, loss_of, val, val_topics, c['n_topics'], micro, dtype)
                if evaluating and not math.isfinite(val_loss):
                    raise SystemExit(diverged.format('validation loss', val_loss, step))
                if rank == 0:
                    topics = np.bincount(topics_of[logged:step].ravel(), minlength=c['n_topics'])
                    lr = c['muon_lr'] * lr_scale(step - 1, max_iters, c['warmup_iters']) if step else 0.0
                    log.write(json.dumps({
                        'step': step, 'loss': loss if step else None, 'val_loss': val_loss,
                        **({'val_loss_topics': by_topic, 'since': since[step].tolist()} if evaluating else {}),
                        'lr': lr,
                        'tok_s': round(tok_s), 'topics': topics.tolist(),
                        'seconds': round(before + time.time() - began, 2)}) + '\n')
                    log.flush()
                    shown = {'loss': f'{loss:.4f}', 'tok/s': f'{tok_s:,.0f}'}
                    bar.set_postfix(shown | ({'val': f'{val_loss:.4f}'} if evaluating else {}))
                    if bar.disable and evaluating:          # no terminal: a line now and then
                        print(f'{folder}: step {step} of {max_iters}, val loss {val_loss:.4f}', flush=True)
                    if evaluating and (step > start or last):
                        save_checkpoint(ckpt_path, {
                            'model': model.state_dict() | {
                                name: muon.master[p] for name, p in model.named_parameters() if p in muon.master},
                            'step': step, 'rows': rows_digest,
                            'optimizer': {'muon': muon.state_dict(), 'adamw': adamw.state_dict()},
                            'rng': torch.get_rng_state()})
                loss_sum.zero_()
                logged, clock = step, time.time()
            if last:
                break

            one_step()
            bar.update()
    except Exception as e:
        if type(e).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            line = str(e).strip().splitlines()[0]
            raise SystemExit(f'torch.compile failed ({type(e).__name__}: {line}); go on with --compile=False') from None
        raise
    except KeyboardInterrupt:
        raise SystemExit(f'\n{folder}: stopped at step {step}; the same command resumes from the last checkpoint'
                         ) from None
    finally:
        bar.close()
        if log:
            log.close()
    if world > 1:
        dist.barrier()                                      # leave together: a process that exits early may abort
    return val_loss if rank == 0 else None

def save_checkpoint(path, ckpt):
    """Atomic: a kill leaves the old checkpoint or the new one."""
    try:
        torch.save(ckpt, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:
        raise SystemExit(f'{path}: cannot write the checkpoint ({e}); the previous one is kept') from None

# -----------------------------------------------------------------------------
# one condition

def data_folder(data_dir, seed):
    """data_dir/seed<k>, as micro-languages are kept, or data_dir itself where it is a dataset (your own tokens)."""
    own = os.path.exists(os.path.join(data_dir, 'meta.json'))
    return data_dir if own else os.path.join(data_dir, f'seed{seed}')

def resolve(cfg, meta):
    """The flat config of a run, as config.json keeps it: this script's keys, and the dataset's parameters."""
    c = {k: getattr(cfg, k) for k in block(__file__)}
    c['n_kv_head'] = cfg.n_head if cfg.n_kv_head is None else cfg.n_kv_head
    c = {**shards.parameters(meta), **c}
    return {**c, 'condition': condition(c), 'parent': None, 'recal_steps': None, 'keep_rope': None}

def read_data(c, run):
    """The dataset of the run folder `run`, whose config is c; stops with one line if its place holds another by now."""
    data = shards.read(data_folder(c['data_dir'], c['seed']))
    for key, there in shards.parameters(data.meta).items():
        if key not in block(__file__) and c.get(key) != there:      # a run has its own seed and eval_rows
            raise SystemExit(f'{run}: was made on another dataset than {data.folder} holds now ({key} = '
                             f'{c.get(key)!r}, there {there!r}); make that dataset again, or this run')
    return data

def check(cfg):
    """Stops with one line at the first setting that can't work."""
    if cfg.order not in ('shuffled', 'topic', 'pseudo'):
        raise SystemExit(f'order = {cfg.order}: shuffled, topic or pseudo')
    counts = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'mlp_hidden', 'batch_size', 'grad_accum',
              'max_iters', 'cycles', 'eval_interval', 'eval_rows', 'log_interval')
    at_least(cfg, **dict.fromkeys(counts, 1))
    if cfg.seed < 0 or cfg.warmup_iters < 0 or not 0 <= cfg.cooldown <= 1:
        raise SystemExit('seed and warmup_iters must not be negative, cooldown is between 0 and 1')

def main(cfg):
    check(cfg)
    device, dtype, compile = machine(cfg.device, cfg.dtype, cfg.compile)
    data = shards.read(data_folder(cfg.data_dir, cfg.seed))
    for key, value in getattr(cfg, 'overrides', {}).items():
        if key not in (*block(__file__), 'source', 'embedder') and data.meta.get(key, value) != value:
            raise SystemExit(f'{cfg.data_dir}: was built with {key} = {data.meta[key]!r}, the config says {value!r}; '
                             'make it again, choose another data_dir, or give that value in a config file')
    c = resolve(cfg, data.meta)
    folder = cfg.run or os.path.join(cfg.out_dir, c['condition'], f'seed{c["seed"]}')
    with memory_errors(RAISE_GRAD_ACCUM.format(**c)):
        model = build(c, torch.Generator().manual_seed(c['seed'])).to(device)
        cooldown_rows = round(c['cooldown'] * c['max_iters']) * c['batch_size']
        labels = dominant_topic(data.train_topics, c['n_topics'])
        rows = row_order(labels, c['max_iters'] * c['batch_size'], c['order'], c['cycles'], cooldown_rows, c['seed'])
        val_loss = fit(model, c, rows, labels, data, folder, device, dtype, compile)
    if val_loss is not None:
        print(f'{folder}: val loss {val_loss:.4f} nats after {c["max_iters"]} steps')
    return folder

if __name__ == '__main__':
    main(configure(__file__))
