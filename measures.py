"""
The measures of attention clustering, as pure functions of arrays; analyze.py collects them.

A[t, s] is the attention of query t on key s and z[t] the topic of token t. allowed[t, s] says whether the layer
lets query t look at key s; uniform attention is 1 / (number of allowed keys) on each of them. A run is a
maximal stretch of one topic.

Batches of rows go through attention_sums -> add -> head_measures, in fp64: a head that depends on position alone
scores P = 0 to rounding. H heads come back as H + 1: the last is uniform attention, the level of chance. Rows are
the unit of every error: the tokens of a row share a few runs, so errors per token are far too small.
"""
import os
from types import SimpleNamespace

os.environ['SCIPY_ARRAY_API'] = '1'         # scikit-learn asks for it before it takes tensors

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binned_statistic
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.distributions import Categorical

VERSION = 2                                 # raise it when a definition changes; rows say which made them
MIN_DISTANCE = 16                           # of the pairs t - s that P and O look at
EPS = 0.01                                  # share of uniform attention in P and O: heads without far mass score 0
BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128)     # distances from a boundary, by the lower edge of their bin

# -----------------------------------------------------------------------------
# topics

def runs(z):
    """Topics [B, T] -> the run of each token [B, T], counted from 0, and the number of runs of each row [B]."""
    run = F.pad((z.diff() != 0).cumsum(1), (1, 0))
    return run, run[:, -1] + 1

def equal_pairs(x):
    """Whether two places of a row hold the same: x [B, T] -> bool [B, T, T]."""
    return x[:, :, None] == x[:, None]

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
    return z[source], source[0] != own

def distance_from_boundary(z):
    """Topics [B, T] -> tokens since the start of the run [B, T]; -1 in the first, which no boundary opens."""
    run, _ = runs(z)
    so_far = equal_pairs(run).tril().sum(2)                           # tokens of the run, this one included
    return torch.where(run > 0, so_far - 1, -1)

# -----------------------------------------------------------------------------
# attention: sums over rows

def attention_sums(A, z, allowed, min_distance=MIN_DISTANCE):
    """
    What the measures of one layer need of a batch of rows: a dict on A's device, combined by `add`.

    A [B, H, T, T] attention, z int64 [B, T] topics, allowed bool [T, T] the keys that the layer lets a query look at.
    Uniform attention on these is one more head, the last: chance. P and O look at the pairs that are allowed, with
    t - s >= min_distance and s >= 1. On these, and 0 elsewhere: S [H + 1, T, T] sums A over rows, S1 sums A where t
    and s share a topic, W [H + 1, T, 1] sums the mass m of each query and W1 [H + 1, T, T] sums m where t and s share
    a topic; `blocks` has for each row the mass between its runs [H + 1, R, R]. n1 [T, T] counts rows where t and s
    share a topic. All else is [H + 1] or [1], summed over rows and queries. Peak memory: about five times A in fp64.
    """
    pairs = allowed.tril(-min_distance)
    pairs[:, 0] = False                                               # the sink
    n_keys = allowed.sum(-1).double()
    uniform = allowed / n_keys[:, None]                               # fp64
    uniform = uniform.expand(len(A), 1, -1, -1)
    A = torch.cat((A, uniform), 1)
    same = equal_pairs(z)[:, None]                                    # [B, 1, T, T]
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
        'within': within,
        'cross': cross,
        'choice': choice,
        'choice_within': within * choice,
        'sink': A[..., 0],
        'self': A.diagonal(dim1=-2, dim2=-1)
    }
    sums = {name: x.sum((0, 2)) for name, x in by_query.items()}

    member = F.one_hot(runs(z)[0]).double()[:, None]                  # [B, 1, T, R]
    far = A * pairs
    blocks = member.mT @ (far @ member)                               # [B, H, R, R]
    mass = far.sum(-1, keepdim=True)                                  # [B, H, T, 1]
    return sums | {
        'z': list(z),
        'blocks': list(blocks),
        'S': far.sum(0),
        'S1': A1.sum(0) * pairs,
        'W': mass.sum(0),
        'W1': (mass * same).sum(0),
        'n1': same.sum((0, 1))
    }

def add(total, part):
    """Two results of attention_sums -> that of their rows together. total may be None; neither is changed."""
    if total is None:
        return part
    return {key: total[key] + part[key] for key in total}             # lists are joined

# -----------------------------------------------------------------------------
# attention: measures

def log_ratio(same, other, uniform):
    """
    ln of the mass [H] on the same topic over that on others. Both are clamped at 0, and EPS of uniform
    attention's, a number, is mixed in.
    """
    same, other = ((1 - EPS) * mass.clamp(min=0) + EPS * uniform for mass in (same, other))
    return (same / other).log()

def score_p(sums):
    """
    Position-matched score P and excess mass, each [H]. P: topic or contiguity. Both are 0 for a head that depends on
    position alone, also where the query decides how much of its mass goes far: A_r(t, s) = w_r(t) k(t, s) on the pairs.

    X1 = sum S1 W0/W and X0 = sum S0 W1/W, S0 = S - S1, W0 = W - W1, over the pairs (t, s) of attention_sums: the mass
    on pairs that share a topic and that do not, weighted to be alike in position and in the mass that the query has
    to give. Terms with W = 0 are 0. U = sum n1 n0/n uniform(t, s): in n1 of the n rows t and s share a topic, in n0
    they do not. P = ln [(1-eps) X1 + eps U] / [(1-eps) X0 + eps U], nan if no pair is both. Excess mass: X1 - X0, per
    query, how much of its attention P is about.
    """
    same = (sums['W1'] / sums['W']).nan_to_num()                      # [H, T, T]
    X1 = (sums['S1'] * (1 - same)).sum((1, 2))
    X0 = ((sums['S'] - sums['S1']) * same).sum((1, 2))
    n = len(sums['z'])                                                # rows
    n1 = sums['n1']
    U = sums['S'][-1] / n * n1 * (n - n1) / n
    return log_ratio(X1, X0, U.sum()), (X1 - X0) / (n * len(n1))

def reliability(P):
    """
    Split-half reliability of a profile over heads, each layer less its mean, from that on two halves of the rows,
    P [2, L, H]: 2r / (1 + r), what r says of all rows together (Spearman 1910, Brown 1910). 0 where r < 0.
    """
    profiles = P - P.mean(2, keepdim=True)
    r = F.cosine_similarity(*profiles.flatten(1), dim=0).clamp(min=0)           # centred: the correlation
    return 2 * r / (1 + r)

def other_blocks(sums):
    """
    What O compares: P pairs of runs j <= i - 2 that share a topic in some, not all, rows with as many runs.

    p [P] is the share of those rows; d [P] is 1 - p where the two share a topic, else -p. Sums over their
    block: B [H, P] of A, U [P] of uniform attention, and R = B - c E, where E is that of the mean pattern over
    rows and c, one a head, the least squares fit. all_d [n, R, R] is d of any two runs of a row; pairs, bool
    [n, R, R]: which are the P. z [n, T]: the topics.
    """
    z = torch.stack(sums['z'])
    member = F.one_hot(runs(z)[0]).double()                           # [n, T, R]
    topic = (member * (1 + z)[:, :, None]).amax(1)                    # [n, R], 0 where a row has fewer runs
    q = equal_pairs(topic).double()                                   # [n, R, R]
    p = torch.empty_like(q)
    for rows in rows_alike(z):
        p[rows] = q[rows].mean(0)
    d = q - p
    pairs = ((p > 0) & (p < 1)).tril(-2)

    E = torch.einsum('nti,hts,nsj->hnij', member, sums['S'] / len(z), member)
    E = E[:, pairs]                                                   # [H + 1, P]
    B = []
    for block, mine in zip(sums['blocks'], pairs):
        i, j = torch.where(mine)
        B.append(block[:, i, j])
    B = torch.cat(B, 1)                                               # [H, P]
    c = (B * E).sum(1) / (E * E).sum(1)
    R = B - c.nan_to_num()[:, None] * E                               # nan: E is 0, and so is B
    return SimpleNamespace(
        z=z,
        pairs=pairs,
        all_d=d,
        d=d[pairs],
        p=p[pairs],
        B=B,
        U=E[-1],
        R=R
    )

def score_o(o):
    """
    Other-segment score O [H] of other_blocks o: topic, not contiguity: do blocks of one topic, apart, get more than
    their place says?

    O = ln [(1-eps) sum(F + R q/p) + eps sum U] / [(1-eps) sum(F + R (1-q)/(1-p)) + eps sum U] over
    other_blocks, with q = d + p, F = B - R, and the first sums clamped at 0. nan if there are none.
    """
    shift = o.R * o.d                                                 # R q/p = R + R d/p
    same = o.B + shift / o.p
    other = o.B - shift / (1 - o.p)
    return log_ratio(same.sum(1), other.sum(1), o.U.sum())

def o_null(o, draws, seed):
    """
    z and p of O [H], from other_blocks o: of T = sum R d, against draws T* where topics say nothing. z = T / sd(T*),
    p = (1 + #{|T*| >= |T|}) / (1 + draws); 0 and 1 where sd is rounding, less than 1e-5 of the block mass.

    A draw exchanges whole label sequences between rows with the same number of runs, so neighbours stay
    distinct. It depends on z and seed alone: all heads and layers share it. Exact if, given their number, run
    lengths do not depend on topics.
    """
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(len(o.z)).repeat(draws, 1)                  # [draws, n] whose labels a row gets
    for rows in rows_alike(o.z):
        order = torch.rand(draws, len(rows), generator=generator).argsort(1)
        source[:, rows] = rows[order]

    drawn_d = torch.stack([o.all_d[rows][o.pairs] for rows in source])  # [draws, P]
    drawn = drawn_d @ o.R.mT                                          # [draws, H]
    sd = drawn.square().mean(0).sqrt()                                # its mean is 0: q averages to p
    sd = torch.where(sd > 1e-5 * o.B.sum(1), sd, torch.inf)
    score = o.R @ o.d / sd
    tail = (drawn / sd).abs() >= score.abs() * (1 - 1e-9)             # equal but for rounding is a tie
    return score, (1 + tail.double().sum(0)) / (1 + draws)

def share(a, b, n):
    """a / b, sums over n queries; nan where b is no mass to speak of."""
    return torch.where(b > 1e-9 * n, a / b, torch.nan)

def head_measures(sums, draws, seed):
    """
    Every measure of every head of a layer: name -> fp64 [H], nan where undefined.

    Over all queries: entropy (nats), entropy_within, entropy_cross (renormalised, weighted by mass), within_all,
    sink (s=0), self (s=t). Over queries with a choice of topics: within, within_cross_ratio. Then score_p, excess_mass,
    score_o, o_z, o_p; draws, seed: of o_null.
    """
    P, excess_mass = score_p(sums)
    o = other_blocks(sums)
    n = o.z.numel()                                                   # queries
    z, p = o_null(o, draws, seed)
    return {
        'entropy': sums['entropy'] / n,
        'entropy_within': share(sums['entropy_within'], sums['within'], n),
        'entropy_cross': share(sums['entropy_cross'], sums['cross'], n),
        'within': sums['choice_within'] / sums['choice'],
        'within_all': sums['within'] / n,
        'within_cross_ratio': share(sums['choice_within'], sums['cross'], n),
        'sink': sums['sink'] / n,
        'self': sums['self'] / n,
        'score_p': P,
        'excess_mass': excess_mass,
        'score_o': score_o(o),
        'o_z': z,
        'o_p': p
    }

# -----------------------------------------------------------------------------
# hidden states

def cka(X, Y):
    """
    Linear CKA of the states X [n, d] and Y [n, e] of the same n tokens in two models: from 0 to 1, equal but for
    rotation, shift and scale.

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, X and Y centred (Kornblith et al. 2019).
    """
    X, Y = (x - x.mean(0) for x in (X.double(), Y.double()))
    cross = (Y.mT @ X).norm() ** 2
    own = (X.mT @ X).norm() * (Y.mT @ Y).norm()
    return (cross / own).item()

# -----------------------------------------------------------------------------
# probes

def probe_tokens(n_rows, block, max_tokens, generator):
    """
    Tokens for a probe, split by row: half of the rows to train on, the others to test on.

    Returns train and test, bool [2, n_rows, block], at most max_tokens / 2 each, drawn from a torch.Generator.
    """
    order = torch.randperm(n_rows, generator=generator)
    masks = torch.zeros(2, n_rows, block, dtype=torch.bool)
    for mask, rows in zip(masks, order.tensor_split([n_rows // 2])):
        drawn = torch.randperm(len(rows) * block, generator=generator)[:max_tokens // 2]
        mask[rows[drawn // block], drawn % block] = True
    return masks

def probe(x_train, y_train, x_test):
    """
    The topics that a probe trained on activations x_train [n, d] and topics y_train [n] names for x_test.

    Scikit-learn's logistic regression on standardised activations, on their device. Its tolerance, 1e-4, gives the
    converged accuracy to 0.1 points (25,000 x 512, 5 topics), 1e-3 up to a whole point less.
    """
    if len(y_train.unique()) == 1:
        return y_train[0].expand(len(x_test))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=15_000))
    with config_context(array_api_dispatch=True):
        return regression.fit(x_train, y_train).predict(x_test)

def running_mean(x, window=32):
    """
    Mean of embeddings x [B, T, d] over the last `window` tokens, this one included, fewer at the start: [B, T,
    d].

    What a probe could read without any attention to content. Sums in fp64, result as x.
    """
    T = x.size(1)
    near = x.new_ones(T, T).double().tril().triu(1 - window)          # the last `window` tokens
    total = near @ x.double()
    return (total / near.sum(-1, keepdim=True)).to(x)

def control_labels(vocab, n_topics, seed):
    """
    A control task (Hewitt & Liang 2019): one random label < n_topics for each token type, int64 [vocab].

    A probe learns it by remembering tokens only; selectivity is the accuracy on topics less the accuracy on
    this.
    """
    return torch.randint(n_topics, (vocab,), generator=torch.Generator().manual_seed(seed))

def majority(y_train, y_test):
    """Accuracy of always naming the most frequent training topic."""
    return (y_test == y_train.bincount().argmax()).double().mean()

def token_identity(x_train, x_test, y_train, y_test, vocab, n_topics):
    """
    Accuracy of naming each token's most frequent training topic: tokens x [n] < vocab, topics y [n] < n_topics.

    It is what can be known without context. Unseen tokens, and ties, get the majority topic.
    """
    pairs = x_train * n_topics + y_train
    counts = pairs.bincount(minlength=vocab * n_topics).view(vocab, n_topics)
    tied = (counts == counts.amax(1, keepdim=True)).sum(1) > 1        # an unseen token ties all topics
    guess = torch.where(tied, counts.sum(0).argmax(), counts.argmax(1))
    return (guess[x_test] == y_test).double().mean()

def by_distance(correct, distance):
    """
    Accuracy in bins 0, 1, 2-3, 4-7, ..., 128 and up of the distance from the last boundary (-1 is left out).

    Arrays correct, distance [n] -> [bins]; nan where a bin is empty.
    """
    return binned_statistic(distance, correct, bins=[*BINS, np.inf]).statistic

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
