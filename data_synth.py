"""
Micro-languages: Markov chains over one vocabulary, a topic label per token, and what ideal observers score.

    python data_synth.py config/run1.py      # writes data/run1/seed0/, in the format of shards.py

Tables, training rows and validation rows have a random stream each, so val.bin does not depend on how many
training rows there are or how they are cut. The same seed gives the same tokens on CPU and GPU: numpy draws the
uniforms and sums the tables, the device only searches them.
Run 1 (110K rows of 513, filter and references included): 28 s and 1.4 GiB on two CPU cores, 4 s on an H200.
"""
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.special import binom, gammaln, xlogy
from tqdm import tqdm

import shards
from configurator import configure

# -----------------------------------------------------------------------------
# config

data_dir = 'data/run1'      # the dataset goes to <data_dir>/seed<seed>
seed = 0                    # of the chains and of every row
chain = 'range'             # range: the log's Run 1, a topic favours its own tokens; group: transitions alone differ
n_topics = 5                # chains
vocab_size = 4096           # tokens; range never emits 0, 1 and 2 (PAD, BOS, EOS)
block_size = 512            # predicted tokens in a row; a row on disk has one more
train_rows = 100_000        # training rows
val_rows = 10_000           # validation rows, always of 2-5 segments
concentration = 5.0         # range: factor on the entries in a topic's own range
beta = 1.5                  # group: standard deviation of the log weights; 0 = no structure
n_groups = 32               # group: equal groups that the tokens are cut into
min_segments = 2            # segments in a training row, uniform from this ...
max_segments = 5            # ... to this; 1 and 1 = pure windows
min_segment_len = 64        # tokens in every segment, at least
repeats = True              # may consecutive segments share a topic
eval_rows = 2000            # the first validation rows, on which the reference losses are taken
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one

# -----------------------------------------------------------------------------

VAL_SEGMENTS = (2, 5)       # not a knob: validation rows are cut alike in every dataset
N_SPECIAL = 3               # range: PAD, BOS, EOS
SIGNATURES = 50             # range: favoured pairs of tokens per topic ...
SIGNATURE_BOOST = 10 / 0.3  # ... and the factor on them
DRAW_ROWS = 25_000          # rows that share a random stream: part of what a seed means


def check(cfg):
    """Stops with one line at the first setting that cannot work."""
    row, low, high = cfg.block_size + 1, cfg.min_segments, cfg.max_segments
    V, T, G = cfg.vocab_size, cfg.n_topics, cfg.n_groups
    most, ranges, groups = max(high, VAL_SEGMENTS[1]), cfg.chain == 'range', cfg.chain == 'group'
    need = 12 * T * V * (V if ranges else G) / 2**30  # tables in fp32, their sums in fp64
    have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    counts = ('block_size', 'train_rows', 'val_rows', 'min_segments', 'min_segment_len', 'eval_rows')
    for wrong, line in (
        *((getattr(cfg, key) < 1, f'{key}={getattr(cfg, key)}: must be at least 1') for key in counts),
        (cfg.seed < 0, f'seed={cfg.seed}: must not be negative'),
        (not (ranges or groups), f'chain={cfg.chain!r}: choose range or group'),
        (not 0 < V <= 65535, f'vocab_size={V}: choose 1 to 65535, tokens are uint16'),
        (not 0 < T <= 255, f'n_topics={T}: choose 1 to 255, labels are uint8'),
        (T == 1 and not cfg.repeats, 'n_topics=1 needs repeats=True, there is no other topic to turn to'),
        (low > high, f'min_segments={low} is more than max_segments={high}'),
        (most * cfg.min_segment_len > row,
         f'{most} segments of min_segment_len={cfg.min_segment_len} do not fit in a row of block_size + 1 = {row} '
         f'tokens (validation rows have up to {VAL_SEGMENTS[1]}); lower min_segment_len'),
        (ranges and not 0 < cfg.concentration < 1e6, f'concentration={cfg.concentration}: choose above 0, below 1e6'),
        (ranges and V < N_SPECIAL + 2 * T, f'vocab_size={V}: {T} ranges and {N_SPECIAL} special tokens need '
         f'{N_SPECIAL + 2 * T}'),
        (groups and not 0 <= cfg.beta <= 5, f'beta={cfg.beta}: choose 0 to 5'),
        (groups and (G < 1 or V % max(G, 1)), f'n_groups={G} does not cut vocab_size={V} into equal groups'),
        (need > have, f'the tables need {need:.0f} GiB, the machine has {have:.0f}; lower vocab_size or n_topics'),
    ):
        if wrong:
            raise SystemExit(f'data_synth.py: {line}')
    try:
        torch.empty(1, dtype=torch.float64, device=cfg.device or None)
    except (RuntimeError, AssertionError, TypeError):
        raise SystemExit(f'data_synth.py: device={cfg.device!r} is not to be had here; choose cpu or cuda') from None


# -----------------------------------------------------------------------------
# the chains: P(b | a, topic z) = tables[z, row_of[a], b]

def range_table(rng, z, cfg):
    """Topic z of the range chain (DESIGN.md 4): fp32 [V - 3, V]; the rows begin at token 3 and sum to 1."""
    n, size = cfg.vocab_size - N_SPECIAL, (cfg.vocab_size - N_SPECIAL) // cfg.n_topics
    first = N_SPECIAL + z * size  # the ranges are equal: a remainder of the tokens belongs to no topic
    table = np.zeros((n, cfg.vocab_size), np.float32)
    # Dirichlet(0.5): normalised Gamma(0.5), which is half the square of a normal
    np.square(rng.standard_normal((n, n), np.float32), out=table[:, N_SPECIAL:])
    table[:, first:first + size] *= cfg.concentration
    a, b = first + rng.permutation(size)[:2 * min(SIGNATURES, size // 2)].reshape(2, -1)  # no token twice
    table[a - N_SPECIAL, b] *= SIGNATURE_BOOST
    table /= table.sum(1, keepdims=True)
    return table


def group_table(rng, z, cfg):
    """A topic of the group chain: fp32 [G, V], doubly stochastic over groups, uniform inside the next group."""
    table = np.exp(cfg.beta * rng.standard_normal((cfg.n_groups, cfg.n_groups)))
    for _ in range(100_000):  # Sinkhorn
        table /= table.sum(1, keepdims=True)
        table /= table.sum(0)
        if abs(table.sum(1) - 1).max() < 1e-12:
            break
    size = cfg.vocab_size // cfg.n_groups
    return (table / size).repeat(size, axis=1).astype(np.float32)


def make_tables(cfg, stream):
    """
    tables fp32 [T, R, V], sums fp64 [T, R, V] and row_of int64 [V], the row of each previous token. sums holds
    cumulative rows, the r-th of all T * R from r to exactly r + 1, so that one search serves them all.
    stream: a SeedSequence, of which each topic gets a child.
    """
    V, T = cfg.vocab_size, cfg.n_topics
    R = cfg.n_groups if cfg.chain == 'group' else V - N_SPECIAL
    row_of = np.arange(V) // (V // R) if cfg.chain == 'group' else np.maximum(np.arange(V) - N_SPECIAL, 0)
    tables, sums, seeds = np.empty((T, R, V), np.float32), np.empty((T, R, V)), stream.spawn(T)

    def make(z):
        table = group_table if cfg.chain == 'group' else range_table
        tables[z] = table(np.random.default_rng(seeds[z]), z, cfg)
        np.cumsum(tables[z], axis=1, dtype=np.float64, out=sums[z])
        sums[z] /= sums[z, :, -1:].copy()
        sums[z] += np.arange(z * R, z * R + R)[:, None]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run while it works
        list(pool.map(make, range(T)))
    return tables, sums, row_of


# -----------------------------------------------------------------------------
# the rows

def draw_segments(rng, chain, rows, length, low, high, shortest):
    """
    Segment lengths, int64 [rows, high]: n ~ U{low..high} of at least `shortest`, sum `length`, then zeros. The tokens
    beyond the minima are spread multinomially with equal weights (range), or as a uniform composition (group).
    """
    n, lengths = rng.integers(low, high + 1, rows), np.zeros((rows, high), np.int64)
    for k in range(low, high + 1):
        which, rest = np.flatnonzero(n == k), length - k * shortest
        if chain == 'range':
            # each spare token picks a segment: integers alone are the same with every version of numpy
            pick = rng.integers(0, k, (len(which), rest), np.uint8)
            extra = np.stack([(pick == i).sum(1) for i in range(k)], axis=1)
        else:  # k - 1 bars in rest + k - 1 places: a uniform subset, by Floyd's algorithm
            bars = np.full((len(which), k - 1), -1)
            for i in range(k - 1):
                pick = rng.integers(0, rest + i + 1, len(which))
                bars[:, i] = np.where((bars == pick[:, None]).any(1), rest + i, pick)
            extra = np.diff(np.sort(bars), prepend=-1, append=rest + k - 1) - 1
        lengths[which, :k] = shortest + extra
    return lengths


def draw_topics(rng, lengths, n_topics, repeats):
    """The topic of every token, uint8 [rows, length]: uniform for each segment, without repeats over the others."""
    topics = rng.integers(0, n_topics, lengths.shape)
    if not repeats:  # later segments turn 1 to T - 1 steps on, around the circle of topics
        topics[:, 1:] = rng.integers(1, n_topics, topics[:, 1:].shape)
        topics = topics.cumsum(1) % n_topics
    return topics.astype(np.uint8).ravel().repeat(lengths.ravel()).reshape(len(lengths), -1)


def draw_tokens(stream, sums, row_of, first, topics, desc=''):
    """
    Tokens uint16 [rows, length] for topics uint8 [rows, length]: the first uniform over first..V-1, each next one
    drawn from the previous token by the table of its own topic. stream: a SeedSequence. sums, row_of: of make_tables,
    as tensors of the device that is to search them.
    """
    tokens, (_, R, V), device = np.empty(topics.shape, np.uint16), sums.shape, sums.device
    seeds = stream.spawn(-(-len(topics) // DRAW_ROWS))

    def draw(rows):
        rng = np.random.default_rng(seeds[rows.start // DRAW_ROWS])
        z = torch.from_numpy(topics[rows].T.copy()).to(device)
        x = rng.integers(first, V, z.shape[1])
        out = [x.astype(np.uint16)]
        x = torch.from_numpy(x).to(device)
        for t in range(1, len(z)):
            # 32 random bits, so that row + u is exact in fp64 and never rounds up into the next row
            u = torch.from_numpy(rng.integers(0, 2**32, len(x), np.uint32) * 2.0**-32).to(device)
            key, order = (z[t].long() * R + row_of[x] + u).sort()  # sorted, neighbours share cache lines
            x[order] = torch.searchsorted(sums.view(-1), key, right=True) - key.long() * V
            out.append(x.cpu().numpy().astype(np.uint16))
        tokens[rows] = np.stack(out, axis=1)

    in_blocks(draw, len(topics), DRAW_ROWS, device, desc)
    return tokens


def in_blocks(work, rows, size, device, desc):
    """work(slice) for each block of rows; on a CPU in a thread per core: the operations are too small to be split."""
    threads, cpu = torch.get_num_threads(), device.type == 'cpu'
    blocks = [slice(i, i + size) for i in range(0, rows, size)]
    torch.set_num_threads(1 if cpu else threads)
    try:
        with ThreadPoolExecutor(threads if cpu else 1) as pool:
            list(tqdm(pool.map(work, blocks), desc, len(blocks), disable=None))
    finally:
        torch.set_num_threads(threads)


# -----------------------------------------------------------------------------
# ideal observers

def hazard_table(chain, length, low, high, shortest):
    """
    H fp64 [length, length]: H[s, t] = P(token t begins a new segment | the last one began at s), by the prior of
    draw_segments: a mixture over the number n of segments and over which of them, k, began at s.
    """
    joint = np.zeros((length, length + 1))  # P(some segment is [s, e)); e = length: it is the last
    for n in range(low, high + 1):
        rest = length - n * shortest
        # tokens beyond the minima: of the segments before k, of k itself, of those after k
        before, own = np.nonzero(np.add.outer(np.arange(rest + 1), np.arange(rest + 1)) <= rest)
        after = rest - before - own
        for k in range(n):
            later = n - k - 1
            if chain == 'range':
                p = np.exp(gammaln(rest + 1) - gammaln(before + 1) - gammaln(own + 1) - gammaln(after + 1)
                           + xlogy(before, k / n) + xlogy(own, 1 / n) + xlogy(after, later / n))
            else:
                p = compositions(before, k) * compositions(after, later) / compositions(rest, n)
            s = k * shortest + before
            keep = (s < length) & (p > 0)
            joint[s[keep], (s + shortest + own)[keep]] += p[keep] / (high - low + 1)
    alive = joint[:, ::-1].cumsum(1)[:, ::-1]  # P(a segment begins at s and ends at t or later)
    return np.divide(joint, alive, out=np.zeros_like(joint), where=alive > 0)[:, :length]


def compositions(total, parts):
    """The number of ways to write total as a sum of `parts` integers >= 0, in fp64."""
    return binom(total + parts - 1, parts - 1) if parts else (total == 0) * 1.0


def likelihood(tokens, tables):
    """P_z(x_{t-1}, x_t), fp64 [S-1, B, T], for tokens int64 [B, S] and tables (fp32 [T, R, V], row_of int64 [V])."""
    P, row_of = tables
    return P[:, row_of[tokens[:, :-1]], tokens[:, 1:]].permute(2, 1, 0).double().contiguous()


def bayes_filter(tokens, tables, hazard, repeats):
    """
    What an observer who knows the chains and how segments are drawn, but sees no label, expects and believes.
    tokens: int64 [B, S]. tables: (fp32 [T, R, V], row_of int64 [V]). hazard: fp64 [S, S], of hazard_table. Tensors.
    Returns log P(x_t | x_0..x_{t-1}) for t = 1..S-1 in nats, fp64 [B, S-1], and P(z_t | x_0..x_t), fp64 [B, S, T].
    The state is P(the current segment began at s and has topic z | past), a semi-Markov filter. Within 0.0002 nats of
    enumeration, not exact, since H does not know the earlier boundaries.
    """
    (B, S), T = tokens.shape, len(tables[0])
    lik = likelihood(tokens, tables)
    state = lik.new_zeros(S, B, T)
    state[0] = 1 / T
    logp, posterior = lik.new_empty(S - 1, B), lik.new_full((S, B, T), 1 / T)  # x_0 is uniform in every topic
    for t in range(1, S):
        end = hazard[:t, t]
        ended, kept = (torch.stack([end, 1 - end]) @ state[:t].view(t, B * T)).view(2, B, T)
        mass = ended.sum(1, keepdim=True)
        new = mass.expand(B, T) / T if repeats else (mass - ended).clamp(min=0) / (T - 1)
        joint = (kept + new) * lik[t - 1]
        p = joint.sum(1, keepdim=True)
        scale = lik[t - 1] / p
        state[:t] *= (1 - end).view(t, 1, 1)
        state[:t] *= scale
        state[t] = new * scale
        logp[t - 1], posterior[t] = p.log().squeeze(1), joint / p
    if not torch.isfinite(logp).all():
        raise SystemExit('bayes_filter: the tokens hold a transition that no topic can make; are the tables theirs?')
    return logp.T, posterior.transpose(0, 1)


def topic_given_token(tables):
    """
    P(z | x) by the stationary token frequencies of each chain, fp64 [V, T]: all that a topic-blind bigram knows of the
    topic. Exact by power iteration; counts in rows differ only by their noise and the tokens right after a boundary.
    """
    P, row_of = tables
    T, R, V = P.shape
    frequency = P.new_full((T, V), 1 / V)
    for _ in range(1000):
        rows = P.new_zeros(T, R).index_add_(1, row_of, frequency)
        last, frequency = frequency, torch.bmm(rows[:, None], P)[:, 0]  # [T, 1, R] @ [T, R, V]
        if (frequency - last).abs().max() < 1e-5 / V:
            break
    return (frequency / frequency.sum(0).clamp(min=1e-30)).T.double()


# -----------------------------------------------------------------------------

def observe(cfg, tokens, topics, tables, hazard):
    """
    The filter's posterior for tokens uint16 and topics uint8 [rows, S], float16 [rows, S, T], and the reference
    losses {'uniform', 'bigram', 'filter', 'oracle'}: mean nats over the predicted tokens of the first eval_rows rows.
    """
    device, prior = tables[0].device, topic_given_token(tables)
    posterior, losses = np.empty((*tokens.shape, cfg.n_topics), np.float16), np.zeros((len(tokens), 3))

    def observe_rows(rows):
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        z = torch.from_numpy(topics[rows].astype(np.int64)).to(device)
        lik = likelihood(x, tables)  # [S-1, B, T]
        logp, belief = bayes_filter(x, tables, hazard, cfg.repeats)
        posterior[rows] = belief.half().cpu().numpy()
        blind, oracle = (lik * prior[x[:, :-1].T]).sum(2), lik.gather(2, z.T[1:, :, None]).squeeze(2)
        losses[rows] = -torch.stack([blind.log().mean(0), logp.mean(1), oracle.log().mean(0)], 1).cpu().numpy()

    size = 256 if device.type == 'cpu' else 4096  # rows whose state fits a cache
    in_blocks(observe_rows, len(tokens), size, device, 'filter')
    losses = losses[:cfg.eval_rows].mean(0).tolist()
    return posterior, dict(zip(('uniform', 'bigram', 'filter', 'oracle'), (math.log(cfg.vocab_size), *losses)))


def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it: another value is another dataset."""
    keys = ('chain', 'n_topics', 'vocab_size', 'block_size', 'seed', 'train_rows', 'val_rows', 'min_segments',
            'max_segments', 'min_segment_len', 'repeats', 'eval_rows')
    keys += ('concentration',) if cfg.chain == 'range' else ('beta', 'n_groups')
    return {'kind': 'synthetic', **{key: getattr(cfg, key) for key in keys}}


def main(cfg):
    """Writes data_dir/seed<seed> unless it is there with the same parameters; returns the folder."""
    check(cfg)
    folder, meta = os.path.join(cfg.data_dir, f'seed{cfg.seed}'), parameters(cfg)
    if shards.is_there(folder, meta):
        shards.read(folder)  # stops if a file has been damaged
        print(f'{folder} is there, with these parameters')
        return folder
    start, device = time.time(), torch.device(cfg.device or ('cuda' if torch.cuda.is_available() else 'cpu'))

    chains, *streams = np.random.SeedSequence(cfg.seed).spawn(3)
    tables, sums, row_of = make_tables(cfg, chains)
    tables, sums, row_of = (torch.from_numpy(a).to(device) for a in (tables, sums, row_of))
    arrays, first = {}, N_SPECIAL if cfg.chain == 'range' else 0
    for name, stream, rows, segments in (('train', streams[0], cfg.train_rows, (cfg.min_segments, cfg.max_segments)),
                                         ('val', streams[1], cfg.val_rows, VAL_SEGMENTS)):
        rng = np.random.default_rng(stream)
        lengths = draw_segments(rng, cfg.chain, rows, cfg.block_size + 1, *segments, cfg.min_segment_len)
        topics = draw_topics(rng, lengths, cfg.n_topics, cfg.repeats)
        arrays[name] = draw_tokens(stream, sums, row_of, first, topics, name)
        arrays[f'{name}_topics'] = topics
    del sums  # 0.7 GB in Run 1
    hazard = hazard_table(cfg.chain, cfg.block_size + 1, *VAL_SEGMENTS, cfg.min_segment_len)
    arrays['val_posterior'], references = observe(cfg, arrays['val'], topics, (tables, row_of),
                                                  torch.from_numpy(hazard).to(device))
    meta |= {'references': references, 'reference_rows': min(cfg.eval_rows, cfg.val_rows)}
    shards.write(folder, arrays, meta)

    size = sum(a.nbytes for a in arrays.values()) / 1e6
    print(f'{folder}: {cfg.train_rows:,} training and {cfg.val_rows:,} validation rows of {cfg.block_size + 1} '
          f'tokens, {size:,.0f} MB, {time.time() - start:.0f} s on {device.type}')
    for key, loss in references.items():
        print(f'  {key:8}{loss:.4f} nats per token')
    return folder


if __name__ == '__main__':
    main(configure(__file__))
