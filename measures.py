"""
The measures of attention clustering, as pure functions of arrays; analyze.py collects them.

A[t, s] is the attention of query t on key s and z[t] the topic of token t. allowed[t, s] says whether the layer
lets query t look at key s; uniform attention is 1 / (number of allowed keys) on each of them. A run is a
maximal stretch of one topic.

Batches of rows go through attention_sums -> add -> head_measures, in fp64: a head that depends on position
alone scores P = 0 to rounding. Rows are the unit of every error: the tokens of a row share a few runs, so
errors per token are far too small.
"""
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch.distributions import Categorical

VERSION = 1                                 # raise it when a definition changes; rows say which made them
EPS = 0.01                                  # share of uniform attention in P and O: heads without far mass score 0
BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128)     # distances from a boundary, by the lower edge of their bin

def to_numpy(x):
    return x.double().cpu().numpy()

# -----------------------------------------------------------------------------
# topics

def runs(z):
    """Topics [B, T] -> the run of each token [B, T], counted from 0, and the number of runs of each row [B]."""
    run = F.pad((z.diff() != 0).cumsum(1), (1, 0))
    return run, run[:, -1] + 1

def rows_alike(z):
    """The rows of topics [n, T] that have the same number of runs: a list of CPU indices, fewest runs first."""
    _, count = runs(z.cpu())
    return [torch.where(count == m)[0] for m in count.unique()]

def exchanged(z, draws, generator):
    """
    Labels z [n, T] handed round between rows with as many runs, `draws` times: [draws, n, T], and which rows
    [n] have another row to change with. No row keeps its own, the others do: a level, where o_null is a test.
    """
    own = torch.arange(len(z))
    source = own.repeat(draws, 1)                                     # [draws, n]
    for rows in rows_alike(z):
        for draw in source:
            ring = rows[torch.randperm(len(rows), generator=generator)]
            draw[ring] = ring.roll(1)                                 # each takes its neighbour's
    changed = source[0] != own
    return z[source.to(z.device)], changed.to(z.device)

# -----------------------------------------------------------------------------
# the keys that a query may look at, and what uniform attention makes of them

def or_causal(allowed, z):
    """The allowed keys, bool [T, T]; those of plain causal attention if None."""
    if allowed is not None:
        return allowed
    t = torch.arange(z.shape[1], device=z.device)
    return t[:, None] >= t

def same_keys(z, allowed=None):
    """Topics [B, T] -> how many of its allowed keys (None: causal) share the query's topic [B, T], fp64."""
    by_topic = or_causal(allowed, z).double() @ F.one_hot(z).double()  # [T, T] @ [B, T, K]
    return by_topic.gather(2, z[:, :, None])[:, :, 0]

def distance_from_boundary(z):
    """Topics [B, T] -> tokens since the start of the run [B, T]; -1 in the first, which no boundary opens."""
    run, _ = runs(z)
    return torch.where(run > 0, same_keys(run).long() - 1, -1)

def uniform_measures(z, allowed=None):
    """
    What uniform attention over the allowed keys (None: causal; all ones: the old log's columns) gives on rows
    of topics z [B, T]: {'entropy' nats, 'within', 'within_all'}, floats. within is nan if no query has a
    choice.
    """
    n_keys = or_causal(allowed, z).sum(-1).double()                   # [T]
    u = same_keys(z, allowed) / n_keys                                # [B, T]
    return {
        'entropy': n_keys.log().mean().item(),
        'within': u[u < 1].mean().item(),
        'within_all': u.mean().item()
    }

# -----------------------------------------------------------------------------
# attention: sums over rows

def attention_sums(A, z, allowed=None, min_distance=16):
    """
    What the measures of one layer need of a batch of rows: a dict on A's device, combined by `add`.

    A [B, H, T, T] attention, z int64 [B, T] topics, allowed bool [T, T] the keys that the layer lets a query
    look at (None: causal). P and O look at the pairs that are allowed, with t - s >= min_distance and s >= 1.
    On these, and 0 elsewhere: S [H, T, T] sums A over rows, S1 sums A where t and s share a topic, U [T, T] is
    uniform attention, and `blocks` has for each row the mass between its runs [H, R, R]. n1 [T, T] counts rows
    where t and s share a topic. All else is [H] or [1], summed over rows and queries. Peak memory: about four
    times A in fp64.
    """
    A = A.double()
    allowed = or_causal(allowed, z)
    pairs = allowed.tril(-min_distance)
    pairs[:, 0] = False                                               # the sink
    n_keys = allowed.sum(-1).double()
    same = (z[:, :, None] == z[:, None])[:, None]                     # [B, 1, T, T]
    choice = (same & allowed).sum(-1) < n_keys                        # [B, 1, T] other topics are in reach

    # mass on keys of the query's topic (within) and on others (cross), and its entropy; each [B, H, T]
    A1 = A * same
    within = A1.sum(-1)
    cross = (A.sum(-1) - within).clamp(min=0)
    terms = -torch.xlogy(A, A)                                        # 0 ln 0 = 0
    entropy = terms.sum(-1)
    part = (terms * same).sum(-1)
    by_query = {
        'entropy': entropy,
        # A / w on the same-topic keys has entropy ln w + part / w; weighted by its mass w that is w ln w + part
        'entropy_within': torch.xlogy(within, within) + part,
        'entropy_cross': torch.xlogy(cross, cross) + entropy - part,
        'entropy_uniform': n_keys.log().expand(choice.shape),
        'within': within,
        'cross': cross,
        'choice': choice,
        'choice_within': within * choice,
        'sink': A[..., 0],
        'self': A.diagonal(dim1=-2, dim2=-1)
    }
    sums = {name: x.sum((0, 2)) for name, x in by_query.items()}

    member = F.one_hot(runs(z)[0]).double()[:, None]                  # [B, 1, T, R]
    blocks = member.mT @ ((A * pairs) @ member)                       # [B, H, R, R]
    return sums | {
        'z': list(z),
        'blocks': list(blocks),
        'S': A.sum(0) * pairs,
        'S1': A1.sum(0) * pairs,
        'n1': same.sum((0, 1)),
        'U': pairs / n_keys[:, None]
    }

def add(total, part):
    """Two results of attention_sums -> that of their rows together. total may be None; neither is changed."""
    if total is None:
        return part
    assert torch.equal(total['U'], part['U']), 'sums over different pairs (T, mask or min_distance) do not add'
    both = {key: total[key] + part[key] for key in total}             # lists are joined
    return both | {'U': part['U']}

# -----------------------------------------------------------------------------
# attention: measures

def log_ratio(same, other, uniform):
    """
    ln of the mass on the same topic over that on others, both [H, ...] and summed over all but heads: numpy
    [H]. Sums are clamped at 0, and EPS of uniform attention's is mixed in.
    """
    mass = torch.stack((same, other)).flatten(2).sum(2).clamp(min=0)  # [2, H]
    same, other = (1 - EPS) * mass + EPS * uniform.sum()
    return to_numpy((same / other).log())

def score_p(sums):
    """
    Position-matched score P [H]: topic or contiguity; 0 for any head that depends on position alone.

    P = ln [(1-eps) sum pi a1 + eps sum pi U] / [(1-eps) sum pi a0 + eps sum pi U], pi = n1 n0/(n1+n0), over the
    pairs of attention_sums. n1, n0: rows where t and s share a topic, or not; a1, a0: mean A over those; U:
    uniform attention. nan if no pair is both.
    """
    n1 = sums['n1']                                                   # [T, T]
    n0 = len(sums['z']) - n1
    same = sums['S1'] * n0                                            # pi a1, all three times n1 + n0
    other = (sums['S'] - sums['S1']) * n1
    return log_ratio(same, other, sums['U'] * n1 * n0)

def other_blocks(sums):
    """
    What O compares: P pairs of runs j <= i - 2 that share a topic in some, not all, rows with as many runs.

    p [P] is the share of those rows; d [P] is 1 - p where the two share a topic, else -p. Sums over their
    block: B [H, P] of A, U [P] of uniform attention, and R = B - c E, where E is that of the mean pattern over
    rows and c, one a head, the least squares fit. all_d [n, R, R] is d of any two runs of a row; pairs, bool
    [n, R, R]: which are the P.
    """
    z = torch.stack(sums['z'])
    member = F.one_hot(runs(z)[0]).double()                           # [n, T, R]
    topic = (member * (1 + z)[:, :, None]).amax(1)                    # [n, R], 0 where a row has fewer runs
    q = (topic[:, :, None] == topic[:, None]).double()                # [n, R, R]
    p = torch.empty_like(q)
    for rows in rows_alike(z):
        p[rows] = q[rows].mean(0)
    d = q - p
    pairs = ((p > 0) & (p < 1)).tril(-2)

    patterns = torch.cat((sums['S'] / len(z), sums['U'][None]))       # [H + 1, T, T]
    blocks = torch.einsum('nti,hts,nsj->hnij', member, patterns, member)
    E = blocks[:-1, pairs]                                            # [H, P]
    B = []
    for block, mine in zip(sums['blocks'], pairs):
        i, j = torch.where(mine)
        B.append(block[:, i, j])
    B = torch.cat(B, 1)                                               # [H, P]
    c = (B * E).sum(1) / (E * E).sum(1)
    R = B - c.nan_to_num()[:, None] * E                               # nan: E is 0, and so is B
    return SimpleNamespace(
        pairs=pairs,
        all_d=d,
        d=d[pairs],
        p=p[pairs],
        B=B,
        U=blocks[-1, pairs],
        R=R
    )

def score_o(sums):
    """
    Other-segment score O [H]: topic, not contiguity: do blocks of one topic, apart, get more than their place
    says?

    O = ln [(1-eps) sum(F + R q/p) + eps sum U] / [(1-eps) sum(F + R (1-q)/(1-p)) + eps sum U] over
    other_blocks, with q = d + p, F = B - R, and the first sums clamped at 0. nan if there are none.
    """
    o = other_blocks(sums)
    shift = o.R * o.d                                                 # R q/p = R + R d/p
    return log_ratio(o.B + shift / o.p, o.B - shift / (1 - o.p), o.U)

def o_null(sums, draws=1000, seed=0):
    """
    T = sum R d [H], its sd [H] and draws [draws, H] if topics say nothing. sd is inf where it is rounding.

    A draw exchanges whole label sequences between rows with the same number of runs, so neighbours stay
    distinct. It depends on z and seed alone: all heads and layers share it. Exact if, given their number, run
    lengths do not depend on topics. Rounding: less than 1e-5 of the block mass.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.stack(sums['z'])
    source = torch.arange(len(z)).repeat(draws, 1)                    # [draws, n] whose labels a row gets
    for rows in rows_alike(z):
        order = torch.rand(draws, len(rows), generator=generator).argsort(1)
        source[:, rows] = rows[order]

    o = other_blocks(sums)
    drawn_d = torch.stack([o.all_d[rows][o.pairs] for rows in source])  # [draws, P]
    T = o.R @ o.d
    drawn = drawn_d @ o.R.mT                                          # [draws, H]
    sd = drawn.square().mean(0).sqrt()                                # its mean is 0: q averages to p
    sd = torch.where(sd > 1e-5 * o.B.sum(1), sd, torch.inf)
    return [to_numpy(x) for x in (T, sd, drawn)]

def null_p(z, drawn):
    """p = (1 + #{|z*| >= |z|}) / (1 + draws) of z [H] among draws [draws, H or 1]."""
    tail = np.abs(drawn) >= np.abs(z) * (1 - 1e-9)                    # equal but for rounding is a tie
    return (1 + tail.sum(0)) / (1 + len(drawn))

def null_z_p(T, sd, draws):
    """z = T / sd and its p of each head [H], from o_null; z = 0, p = 1 where sd is inf."""
    z = T / sd
    return z, null_p(z, draws / sd)

def max_statistic(T, sd, draws):
    """p [H] adjusted for all heads (max-|z|): T, sd [H], draws [draws, H] of o_null, layers joined along H."""
    return null_p(T / sd, np.abs(draws / sd).max(1, keepdims=True))   # the largest of each draw [draws, 1]

def share(a, b, n):
    """a / b, sums over n queries; nan where b is no mass to speak of."""
    return torch.where(b > 1e-9 * n, a / b, torch.nan)

def head_measures(sums, null):
    """
    Every measure of every head of a layer: name -> float64 array [H], nan where undefined.

    Over all queries: entropy (nats), entropy_ratio (to uniform attention), entropy_within, entropy_cross
    (renormalised, weighted by mass), within_all, sink (s=0), self (s=t). Over queries with a choice of topics:
    within, within_cross_ratio. Then score_p, score_o, o_z, o_p. null: the result of o_null.
    """
    n = len(sums['z']) * len(sums['U'])                               # queries
    found = {
        'entropy': sums['entropy'] / n,
        'entropy_ratio': sums['entropy'] / sums['entropy_uniform'],
        'entropy_within': share(sums['entropy_within'], sums['within'], n),
        'entropy_cross': share(sums['entropy_cross'], sums['cross'], n),
        'within': sums['choice_within'] / sums['choice'],
        'within_all': sums['within'] / n,
        'within_cross_ratio': share(sums['choice_within'], sums['cross'], n),
        'sink': sums['sink'] / n,
        'self': sums['self'] / n
    }
    found = {name: to_numpy(x) for name, x in found.items()}
    z, p = null_z_p(*null)
    return found | {'score_p': score_p(sums), 'score_o': score_o(sums), 'o_z': z, 'o_p': p}

# -----------------------------------------------------------------------------
# probes

def probe_tokens(n_rows, block, max_tokens, generator):
    """
    Tokens for a probe, split by row: half of the rows to train on, the others to test on.

    Returns [train, test]: sorted int64 indices [<= max_tokens / 2] into [n_rows * block], drawn from a
    torch.Generator.
    """
    order = torch.randperm(n_rows, generator=generator)
    parts = []
    for rows in order.tensor_split([n_rows // 2]):
        tokens = (rows[:, None] * block + torch.arange(block)).flatten()
        drawn = torch.randperm(len(tokens), generator=generator)
        parts.append(tokens[drawn[:max_tokens // 2]].sort().values)
    return parts

def probe_loss(w, x, onehot):
    """scikit-learn's objective at C = 1 and its gradient; flat w [K * (d + 1)], x [n, d + 1], onehot [n, K]."""
    n, K = onehot.shape
    w = torch.from_numpy(w).to(x).view(K, -1)
    l2 = w / n
    l2[:, -1] = 0                                                     # the intercepts are free
    logp = (x @ w.mT).log_softmax(1)
    loss = (w * l2).sum() / 2 - (logp * onehot).sum() / n
    gradient = ((logp.exp() - onehot) / n).mT @ x + l2
    return loss.item(), to_numpy(gradient.flatten())

def probe(x_train, y_train, x_test):
    """
    The topics that a probe trained on activations x_train [n, d] and topics y_train [n] names for x_test.

    Logistic regression on standardised activations: the objective and the solver of scikit-learn's
    LogisticRegression (multinomial, L2), its products on x's device. gtol 1e-4 gives the converged accuracy to
    0.1 points (25,000 x 512, 5 topics), 1e-3 up to a whole point less.
    """
    topics, y = y_train.unique(return_inverse=True)                   # as 0..K-1
    mean = x_train.mean(0)
    sd = x_train.std(0, correction=0)
    sd = torch.where(sd > 1e-6 * mean.abs(), sd, 1.)                  # constant but for rounding
    x, x_test = (F.pad((x - mean) / sd, (0, 1), value=1.) for x in (x_train, x_test))      # [n, d + 1]
    start = np.zeros(len(topics) * x.shape[1])
    options = {
        'maxls': 50,
        'gtol': 1e-4,
        'ftol': 64 * np.finfo(float).eps
    }
    with threadpool_limits(1, 'blas'):                                # scipy's would get in torch's way
        found = minimize(probe_loss, start, (x, F.one_hot(y).to(x)), 'L-BFGS-B', jac=True, options=options)
    W = torch.from_numpy(found.x).to(x).view(len(topics), -1)         # [K, d + 1], the intercept last
    return topics[(x_test @ W.mT).argmax(1)]

def running_mean(x, window=32):
    """
    Mean of embeddings x [B, T, d] over the last `window` tokens, this one included, fewer at the start: [B, T,
    d].

    What a probe could read without any attention to content. Sums in fp64, result as x.
    """
    near = or_causal(None, x).triu(1 - window).double()               # [T, T] the last `window` tokens
    return (near @ x.double() / near.sum(-1, keepdim=True)).to(x)

def control_labels(vocab, n_topics, seed):
    """
    A control task (Hewitt & Liang 2019): one random label < n_topics for each token type, int64 [vocab].

    A probe learns it by remembering tokens only; selectivity is the accuracy on topics less the accuracy on
    this.
    """
    return torch.randint(n_topics, (vocab,), generator=torch.Generator().manual_seed(seed))

def majority(y_train, y_test):
    """Accuracy of always naming the most frequent training topic."""
    return float((y_test == np.bincount(y_train).argmax()).mean())

def token_identity(x_train, y_train, x_test, y_test, vocab):
    """
    Accuracy of naming each token's most frequent training topic: tokens x [n] < vocab, topics y [n].

    It is what can be known without context. Unseen tokens, and ties, get the majority topic.
    """
    counts = np.zeros((vocab, y_train.max() + 1))
    np.add.at(counts, (x_train, y_train), 1)
    tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1        # an unseen token ties all topics
    guess = np.where(tied, counts.sum(0).argmax(), counts.argmax(1))
    return float((guess[x_test] == y_test).mean())

def by_distance(correct, distance):
    """
    Accuracy in bins 0, 1, 2-3, 4-7, ..., 128 and up of the distance from the last boundary (-1 is left out).

    Arrays correct, distance [n] -> {'distance': lower edges, 'accuracy'}, lists; None where a bin is empty.
    """
    which = np.digitize(distance, BINS) - 1
    accuracy = []
    for k in range(len(BINS)):
        part = correct[which == k]
        accuracy.append(float(part.mean()) if len(part) else None)
    return {'distance': list(BINS), 'accuracy': accuracy}

# -----------------------------------------------------------------------------
# circuits: weights are [out, in], as in Hugging Face; query head h reads kv head h // (H / K)

def product_rank(X, Y):
    """
    Effective rank [H] of X_h' Y_g for factors X [H, d, n], Y [K, d, n], K kv heads: exp(H(s^2 / sum s^2)) of
    the singular values s, 1 for rank one, r for a flat spectrum of r. With X' = Q R they are those of the small
    R Y.
    """
    R = torch.linalg.qr(X.mT).R                                       # [H, r, d], r = min(d, n)
    s = torch.linalg.svdvals(R @ Y.repeat_interleave(len(X) // len(Y), 0))
    return Categorical(s ** 2).entropy().exp()

def by_head(W, head_dim):
    """Weights [heads * head_dim, n] -> [heads, head_dim, n], fp64."""
    return W.double().unflatten(0, (-1, head_dim))

def qk_rank(W_Q, W_K, g1, gq, gk):
    """
    Effective rank [H] of diag(g1) W_Q' diag(gq) diag(gk) W_K diag(g1), the scores' bilinear form at distance 0.

    W_Q [H * head_dim, n_embd], W_K [K * head_dim, n_embd]; gains g1 [n_embd] of the norm before, gq, gk
    [head_dim] of QK-Norm. Scores are this form up to positive factors per token: compare shapes, not scales.
    Factored as in Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits).
    """
    d = len(gq)
    Q = by_head(W_Q, d) * gq[:, None] * g1                            # [H, head_dim, n_embd]
    K = by_head(W_K, d) * gk[:, None] * g1
    return product_rank(Q, K)

def ov_rank(W_O, W_V, g1, head_dim):
    """Effective rank [H] of W_O W_V diag(g1); W_O [n_embd, H * head_dim], W_V [K * head_dim, n_embd]."""
    return product_rank(by_head(W_O.mT, head_dim), by_head(W_V, head_dim) * g1)
