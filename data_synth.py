"""
Micro-languages: Markov chains over one vocabulary, a topic label per token, and what ideal observers score.

Reads nothing. Writes data_dir/seed<k>/ in the format of shards.py; what is there already is checked and kept.

    python data_synth.py config/demo.py
    python data_synth.py config/run1.py --seed=1

Tables, training rows and validation rows have a random stream each, so val.bin does not depend on how many
training rows there are or how they are cut. The same seed gives the same tokens on CPU and GPU: numpy draws the
uniforms and sums the tables, the device only searches them.
Run 1 (110K rows of 513, filter and references included): 56 s of one CPU core and 1.8 GiB.
"""
import math
from os.path import exists

import numpy as np
import torch
from scipy import stats

import shards
from configurator import block, command
from machine import machine
from runs import locked

# -----------------------------------------------------------------------------
# config

data_dir = 'data/run1'      # the dataset goes to <data_dir>/seed<seed>
chain = 'range'             # range: the log's Run 1, a topic favours its own tokens; group: transitions alone differ
n_topics = 5                # chains [1, 255]
vocab_size = 4096           # tokens; range never emits 0, 1 and 2 (PAD, BOS, EOS) [1, 65535]
block_size = 512            # predicted tokens in a row; a row on disk has one more [1, 2**31)
seed = 0                    # of the chains and of every row [0, 2**63)
train_rows = 100_000        # training rows [1, 2**31)
val_rows = 10_000           # validation rows, always of 2-5 segments [1, 2**31)
min_segments = 2            # segments in a training row, uniform from this ... [1, 2**31)
max_segments = 5            # ... to this; 1 and 1 = pure windows [1, 2**31)
min_segment_len = 64        # tokens in every segment, at least [1, 2**31)
repeats = True              # may consecutive segments share a topic
eval_rows = 2000            # the first validation rows, on which the reference losses are taken [1, 2**31)
concentration = 5.0         # range: factor on the entries in a topic's own range (0, 1e6)
beta = 1.5                  # group: standard deviation of the log weights; 0 = no structure [0, 5]
n_groups = 32               # group: equal groups that the tokens are cut into [1, 2**31)
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one

# -----------------------------------------------------------------------------

VAL_SEGMENTS = (2, 5)       # not a knob: validation rows are cut alike in every dataset
N_SPECIAL = 3               # range: PAD, BOS, EOS
SIGNATURES = 50             # range: favoured pairs of tokens per topic ...
SIGNATURE_BOOST = 10 / 0.3  # ... and the factor on them
DRAW_ROWS = 25_000          # rows that share a random stream: part of what a seed means


# -----------------------------------------------------------------------------
# the chains: P(b | a, topic z) = tables[z, row_of[a], b]

def range_table(rng, z, cfg):
    """Topic z of the range chain, the log's Run 1: fp32 [V - 3, V]; the rows begin at token 3 and sum to 1."""
    n = cfg.vocab_size - N_SPECIAL
    size = n // cfg.n_topics                # the ranges are equal: a remainder of the tokens belongs to no topic
    first = z * size
    # Dirichlet(0.5): normalised Gamma(0.5), which is half the square of a normal
    table = np.square(rng.standard_normal((n, n), np.float32))
    table[:, first:first + size] *= cfg.concentration
    pairs = min(SIGNATURES, size // 2)
    a, b = first + rng.permutation(size)[:2 * pairs].reshape(2, pairs)      # no token twice
    table[a, b] *= SIGNATURE_BOOST
    table = np.pad(table, [(0, 0), (N_SPECIAL, 0)])
    return table / table.sum(1, keepdims=True)


def group_table(rng, z, cfg):
    """A topic of the group chain: fp32 [G, V], doubly stochastic over groups, uniform inside the next group."""
    table = np.exp(cfg.beta * rng.standard_normal((cfg.n_groups, cfg.n_groups)))
    while abs(table.sum(1) - 1).max() > 1e-12:              # Sinkhorn
        table /= table.sum(1, keepdims=True)
        table /= table.sum(0)
    size = cfg.vocab_size // cfg.n_groups
    return (table / size).repeat(size, axis=1).astype(np.float32)


def make_chains(cfg, device):
    """
    tables fp32 [T, R, V], sums fp64 [T, R, V] and row_of int64 [V], the row of each previous token, on the device;
    then the random streams of training and validation rows. sums holds cumulative rows, the r-th of all T * R from r to
    exactly r + 1, so that one search serves them all.
    """
    table_stream, *row_streams = np.random.SeedSequence(cfg.seed).spawn(3)
    token = np.arange(cfg.vocab_size)
    if cfg.chain == 'range':
        make = range_table
        row_of = np.maximum(token - N_SPECIAL, 0)
    else:
        make = group_table
        row_of = token // (cfg.vocab_size // cfg.n_groups)
    seeds = table_stream.spawn(cfg.n_topics)
    tables = np.stack([make(np.random.default_rng(seed), z, cfg) for z, seed in enumerate(seeds)])
    T, R, _ = tables.shape
    sums = tables.cumsum(2, dtype=np.float64)
    sums /= sums[:, :, -1:].copy()
    sums += np.arange(T * R).reshape(T, R, 1)
    made = [torch.from_numpy(array).to(device) for array in (tables, sums, row_of)]
    return *made, *row_streams


# -----------------------------------------------------------------------------
# the rows

def multinomial(rng, rows, rest, k):
    """`rest` tokens over k segments with equal weights, int64 [rows, k]."""
    # each token picks a segment: integers alone are the same with every version of numpy
    pick = rng.integers(0, k, (rows, rest), np.uint8)
    return np.stack([(pick == i).sum(1) for i in range(k)], axis=1)


def composition(rng, rows, rest, k):
    """`rest` tokens over k segments, every way as likely, int64 [rows, k]."""
    # k - 1 bars in rest + k - 1 places: a uniform subset, by Floyd's algorithm
    bars = np.full((rows, k - 1), -1)
    for i in range(k - 1):
        pick = rng.integers(0, rest + i + 1, rows)
        taken = (bars == pick[:, None]).any(1)
        bars[:, i] = np.where(taken, rest + i, pick)
    return np.diff(np.sort(bars), prepend=-1, append=rest + k - 1) - 1


def draw_segments(rng, chain, rows, length, low, high, shortest):
    """
    Segment lengths, int64 [rows, high]: n ~ U{low..high} of at least `shortest`, sum `length`, then zeros. The tokens
    beyond the minima are spread multinomially with equal weights (range), or as a uniform composition (group).
    """
    spread = multinomial if chain == 'range' else composition
    n = rng.integers(low, high + 1, rows)
    lengths = np.zeros((rows, high), np.int64)
    for k in range(low, high + 1):
        which = n == k
        lengths[which, :k] = shortest + spread(rng, which.sum(), length - k * shortest, k)
    return lengths


def draw_topics(rng, lengths, n_topics, repeats):
    """The topic of every token, uint8 [rows, length]: uniform for each segment, without repeats over the others."""
    topics = rng.integers(0, n_topics, lengths.shape)
    if not repeats:                         # later segments turn 1 to T - 1 steps on, around the circle of topics
        topics[:, 1:] = rng.integers(1, n_topics, topics[:, 1:].shape)
        topics = topics.cumsum(1) % n_topics
    tokens = topics.astype(np.uint8).ravel().repeat(lengths.ravel())
    return tokens.reshape(len(lengths), -1)


def draw_tokens(rng, sums, row_of, first, topics):
    """
    Tokens uint16 [rows, length] for topics uint8 [rows, length]: the first uniform over first..V-1, each next one
    drawn from the previous token by the table of its own topic. sums, row_of: of make_chains, whose
    device searches them.
    """
    device = sums.device
    V = len(row_of)
    x = torch.from_numpy(rng.integers(first, V, len(topics))).to(device)
    table = topics.T[1:] * float(sums.size(1))              # where a topic's table begins, fp64 [length - 1, rows]
    # 32 random bits, so that row + u is exact in fp64 and never rounds up into the next row
    u = rng.integers(0, 2**32, table.shape, np.uint32) * 2.0**-32
    tokens = [x]
    for key in torch.from_numpy(table + u).to(device):      # position by position
        key = key + row_of[x]
        x = torch.searchsorted(sums.view(-1), key, right=True) - key.long() * V
        tokens.append(x)
    return torch.stack(tokens, 1).cpu().numpy().astype(np.uint16)


def draw_rows(cfg, stream, rows, segments, sums, row_of):
    """
    Tokens uint16 and topics uint8 of rows with this many segments, (low, high): both [rows, block_size + 1].
    stream: a SeedSequence, of which each block of DRAW_ROWS rows gets a child for its tokens.
    """
    rng = np.random.default_rng(stream)
    lengths = draw_segments(rng, cfg.chain, rows, cfg.block_size + 1, *segments, cfg.min_segment_len)
    topics = draw_topics(rng, lengths, cfg.n_topics, cfg.repeats)
    first = N_SPECIAL if cfg.chain == 'range' else 0
    tokens = []
    for start in range(0, rows, DRAW_ROWS):
        rng = np.random.default_rng(*stream.spawn(1))
        tokens.append(draw_tokens(rng, sums, row_of, first, topics[start:start + DRAW_ROWS]))
    return np.concatenate(tokens), topics


# -----------------------------------------------------------------------------
# ideal observers

def spread_chance(chain, tokens, segments):
    """P(of all tokens of a row, tokens [.., 3] fall to so many of its segments [3]), as draw_segments spreads them."""
    total = tokens[0].sum()
    if chain == 'range':
        return stats.multinomial.pmf(tokens, total, segments / segments.sum())
    # uniform compositions: all weights 1; of no segments as good as 0, which scipy does not take
    return stats.dirichlet_multinomial.pmf(tokens, np.maximum(segments, 1e-307), total)


def hazard_table(chain, length, low, high, shortest):
    """
    H fp64 [length, length]: H[s, t] = P(token t begins a new segment | the last one began at s), by the prior of
    draw_segments: a mixture over the number n of segments and over which of them, k, began at s.
    """
    joint = np.zeros((length, length + 1))  # P(some segment is [s, e)); e = length: it is the last
    for n in range(low, high + 1):
        rest = length - n * shortest
        spare = np.arange(rest + 1)
        # tokens beyond the minima: of the segments before k, of k itself, of those after k
        before, own = np.nonzero(spare[:, None] + spare <= rest)
        tokens = np.stack([before, own, rest - before - own], axis=1)
        for k in range(n):
            start = k * shortest + before
            end = start + shortest + own
            chance = spread_chance(chain, tokens, np.array([k, 1, n - k - 1]))
            joint[start, end] += chance / (high - low + 1)
    alive = joint[:, ::-1].cumsum(1)[:, ::-1]               # P(a segment begins at s and ends at t or later)
    return (joint / np.maximum(alive, 1e-300))[:, :length]


def likelihood(tokens, P, row_of):
    """P_z(x_{t-1}, x_t), fp64 [S-1, B, T], for tokens int64 [B, S], tables P fp32 [T, R, V] and row_of int64 [V]."""
    found = P[:, row_of[tokens[:, :-1]], tokens[:, 1:]]     # [T, B, S-1]
    return found.permute(2, 1, 0).double().contiguous()


def bayes_filter(lik, hazard, repeats):
    """
    What an observer who knows the chains and how segments are drawn, but sees no label, expects and believes.
    lik: fp64 [S-1, B, T], of likelihood. hazard: fp64 [S, S], of hazard_table. Tensors.
    Returns P(x_t | x_0..x_{t-1}) for t = 1..S-1, fp64 [S-1, B], and P(z_t | x_0..x_t), fp64 [S, B, T].
    The state is P(the current segment began at s and has topic z | past), a semi-Markov filter. Within 0.0002 nats of
    enumeration, not exact, since H does not know the earlier boundaries.
    """
    S = len(hazard)
    _, B, T = lik.shape
    state = lik.new_zeros(S, B, T)
    state[0] = 1 / T                        # x_0 is uniform in every topic
    expected = []
    posterior = [state[0].clone()]
    for t in range(1, S):
        end = hazard[:t, t]
        split = torch.stack([end, 1 - end]) @ state[:t].view(t, B * T)
        ended, kept = split.view(2, B, T)
        mass = ended.sum(1, keepdim=True)
        if repeats:
            new = mass / T
        else:
            new = (mass - ended).clamp(min=0) / (T - 1)
        joint = (kept + new) * lik[t - 1]
        p = joint.sum(1, keepdim=True)
        scale = lik[t - 1] / p
        state[:t] *= (1 - end).view(t, 1, 1)
        state[:t] *= scale
        state[t] = new * scale
        expected.append(p.squeeze(1))
        posterior.append(joint / p)
    return torch.stack(expected), torch.stack(posterior)


def val_hazard(cfg, device):
    """hazard_table of validation rows, whose segments all datasets draw alike, on the device."""
    hazard = hazard_table(cfg.chain, cfg.block_size + 1, *VAL_SEGMENTS, cfg.min_segment_len)
    return torch.from_numpy(hazard).to(device)


def topic_given_token(P, row_of):
    """
    P(z | x) by the stationary token frequencies of each chain, fp64 [V, T]: all that a topic-blind bigram knows of the
    topic. Exact by power iteration; counts in rows differ only by their noise and the tokens right after a boundary.
    P, row_of: as in likelihood.
    """
    T, R, V = P.shape
    frequency = P.new_full((T, V), 1 / V)
    for _ in range(1000):
        last = frequency
        rows = P.new_zeros(T, R).index_add_(1, row_of, last)
        frequency = (rows[:, None] @ P)[:, 0]       # [T, 1, R] @ [T, R, V]
        if (frequency - last).abs().max() < 1e-5 / V:
            break
    return (frequency / frequency.sum(0).clamp(min=1e-30)).T.double()


def observe(cfg, tokens, topics, P, row_of):
    """
    The filter's posterior for tokens uint16 and topics uint8 [rows, S], float16 [rows, S, T], and the reference
    losses {'uniform', 'bigram', 'filter', 'oracle'}: mean nats over the predicted tokens of the first eval_rows rows.
    """
    device = P.device
    prior = topic_given_token(P, row_of)
    hazard = val_hazard(cfg, device)
    posteriors = []
    losses = []
    for start in range(0, len(tokens), 256):                # rows whose state fits a cache
        x, z = (torch.from_numpy(a[start:start + 256].astype(int)).to(device) for a in (tokens, topics))
        lik = likelihood(x, P, row_of)                      # [S-1, B, T]
        bigram = (lik * prior[x[:, :-1].T]).sum(2)          # [S-1, B]
        expected, posterior = bayes_filter(lik, hazard, cfg.repeats)
        oracle = lik.gather(2, z.T[1:, :, None]).squeeze(2)
        p = torch.stack([bigram, expected, oracle], 2)
        losses.append(-p.log().mean(0).cpu())
        posteriors.append(posterior.transpose(0, 1).half().cpu())
    losses = torch.cat(losses)[:cfg.eval_rows].numpy().mean(0).tolist()
    references = {'uniform': math.log(cfg.vocab_size)} | dict(zip(('bigram', 'filter', 'oracle'), losses))
    return torch.cat(posteriors).numpy(), references


# -----------------------------------------------------------------------------

def check(cfg):
    """Stops with one line at the first setting that cannot work."""
    if cfg.max_segments < cfg.min_segments:
        raise SystemExit(f'max_segments = {cfg.max_segments}: must be at least min_segments = {cfg.min_segments}')
    if cfg.n_topics == 1 and not cfg.repeats:
        raise SystemExit('n_topics = 1: without repeats there must be another topic to turn to')
    segments = max(cfg.max_segments, VAL_SEGMENTS[1])
    if segments * cfg.min_segment_len > cfg.block_size + 1:
        raise SystemExit(f'{segments} segments of min_segment_len = {cfg.min_segment_len} do not fit in a row of '
                         f'block_size + 1 = {cfg.block_size + 1} tokens (validation rows have up to '
                         f'{VAL_SEGMENTS[1]}); lower it')
    if cfg.chain not in ('range', 'group'):
        raise SystemExit(f'chain = {cfg.chain!r}: choose range or group')
    least = N_SPECIAL + 2 * cfg.n_topics
    if cfg.chain == 'range' and cfg.vocab_size < least:
        raise SystemExit(f'vocab_size = {cfg.vocab_size}: {cfg.n_topics} ranges and the special tokens need {least}')
    if cfg.chain == 'group' and cfg.vocab_size % cfg.n_groups:
        raise SystemExit(f'n_groups = {cfg.n_groups} does not cut vocab_size = {cfg.vocab_size} into equal groups')
    if exists(f'{cfg.data_dir}/meta.json'):
        raise SystemExit(f'{cfg.data_dir}: is a dataset itself; use it with --data_script= (empty)')


def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it: another value is another dataset."""
    unused = {'data_dir', 'device'} | ({'beta', 'n_groups'} if cfg.chain == 'range' else {'concentration'})
    return {'kind': 'synthetic'} | {key: getattr(cfg, key) for key in block(__file__) if key not in unused}


def main(cfg):
    """Writes data_dir/seed<seed> unless it is there with the same parameters; returns the folder."""
    check(cfg)
    device, *_ = machine(cfg.device)
    folder = f'{cfg.data_dir}/seed{cfg.seed}'
    meta = parameters(cfg)
    with locked(folder):
        if shards.is_there(folder, meta):
            return folder

        tables, sums, row_of, train_stream, val_stream = make_chains(cfg, device)
        segments = cfg.min_segments, cfg.max_segments
        train = draw_rows(cfg, train_stream, cfg.train_rows, segments, sums, row_of)
        val = draw_rows(cfg, val_stream, cfg.val_rows, VAL_SEGMENTS, sums, row_of)
        del sums                                            # 0.7 GB in Run 1
        posterior, references = observe(cfg, *val, tables, row_of)

        arrays = dict(zip(shards.DTYPES, (*train, *val, posterior)))
        meta |= {'references': references, 'reference_rows': min(cfg.eval_rows, cfg.val_rows)}
        shards.write(folder, arrays, meta)
    print(f'{folder}, nats a token:', *[f'{key} {loss:.4f}' for key, loss in references.items()])
    return folder


if __name__ == '__main__':
    command(main, __file__)
