"""The measures of attention clustering, as pure functions of arrays; analyze.py collects them.

A[t,s] is the attention of query t on key s, z[t] the topic of token t, a run a maximal stretch of one topic. Batches
of rows go through attention_sums -> add -> head_measures, in fp64: a head that depends on position alone scores P = 0
to rounding. Rows are the unit of every error: tokens of a row share a few runs, errors per token are far too small.
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, nnls
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

EPS = 0.01                                  # uniform attention's share in P and O: a head without far mass scores 0
BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128)     # distances from a boundary, by the lower edge of their bin

# ---------------------------------------------------------------------------------------------------------------
# topics

def runs(z):
    """Topics [B,T] -> the run of each token [B,T], counted from 0, and the number of runs of each row [B]."""
    run = F.pad((z[:, 1:] != z[:, :-1]).cumsum(1), (1, 0))
    return run, run[:, -1] + 1

def run_edges(z):
    """Topics [B,T] -> start and end (exclusive) of each run, [B,R], R the most runs of a row; T, T where missing."""
    run, count = runs(z)
    index = torch.arange(int(count.max()), device=z.device)
    return (run[:, :, None] < index).sum(1), (run[:, :, None] <= index).sum(1)                   # [B,T,R] -> [B,R]

def same_keys(z):
    """Topics [B,T] -> how many keys s <= t share the query's topic [B,T], fp64; the query is one of them."""
    seen = F.one_hot(z.long()).cumsum(1)                                                         # [B,T,K]
    return seen.gather(2, z.long()[:, :, None])[:, :, 0].double()

def uniform_measures(z, causal=True):
    """What uniform attention gives on rows of topics z [B,T]: {'entropy' nats, 'within', 'within_all'}, floats.

    within is nan if no query has a choice. causal=False: uniform over all T keys, as in the old log.
    """
    n_keys = torch.arange(1, z.shape[1] + 1, device=z.device).double()                           # [T]
    same = same_keys(z)
    if not causal:                               # keys before the query, keys after it, and itself counted twice
        n_keys, same = torch.full_like(n_keys, z.shape[1]), same + same_keys(z.flip(1)).flip(1) - 1
    u = same / n_keys                                                                            # [B,T]
    return {'entropy': n_keys.log().mean().item(), 'within': u[u < 1].mean().item(), 'within_all': u.mean().item()}

def distance_from_boundary(z):
    """Topics [B,T] -> tokens since the start of the run [B,T]; -1 in the first run, which no boundary opens."""
    run, start = runs(z)[0], run_edges(z)[0]
    return torch.where(run > 0, torch.arange(z.shape[1], device=z.device) - start.gather(1, run), -1)

def exchanged(z, draws, generator):
    """The labels z [n,T] handed round between rows with as many runs, as `draws` times: [draws,n,T], and which rows [n]
    have another row to change with. No row keeps its own, the others do: a level, where o_null is a test."""
    source, count = torch.arange(len(z)).repeat(draws, 1), runs(z)[1].cpu()                      # [draws,n]
    for m in count.unique():
        rows = (count == m).nonzero()[:, 0]
        for draw in source:
            ring = rows[torch.randperm(len(rows), generator=generator)]
            draw[ring] = ring.roll(1)                                              # each takes its neighbour's
    return z[source.to(z.device)], (count.bincount()[count] > 1).to(z.device)

# ---------------------------------------------------------------------------------------------------------------
# attention: sums over rows

def attention_sums(A, z, n_topics, min_distance=16):
    """What the measures of one layer need of a batch of rows: a dict of tensors on A's device, combined by `add`.

    A [B,H,T,T] causal attention, z [B,T] topics < n_topics. S, S1 [H,T,T] and n1 [T,T] are sums over rows: of A,
    of A where t and s share a topic, and the number of such rows. `pairs` [T,T] are the pairs P and O look at:
    t-s >= min_distance, s >= 1. All else has an entry per row. Peak memory: about four times A in fp64.
    """
    A, z = A.double(), z.long()
    t = torch.arange(A.shape[-1], device=A.device)
    pairs = (t[:, None] - t >= min_distance) & (t >= 1)                            # [T,T]
    same = (z[:, :, None] == z[:, None, :]).double()[:, None]                      # [B,1,T,T]
    A1 = A * same
    S, S1, n1 = A.sum(0), A1.sum(0), same.sum((0, 1))
    w, first, own = A1.sum(-1), A[..., 0], A.diagonal(dim1=-2, dim2=-1)            # [B,H,T] mass on topic, s=0, s=t
    c = (A.sum(-1) - w).clamp(min=0)                                               # [B,H,T] mass on other topics

    AlogA = torch.xlogy(A, A, out=A1)                                              # 0 ln 0 = 0
    e = AlogA.sum(-1)                                                              # [B,H,T]
    e1 = AlogA.mul_(same).sum(-1)                                                  # [B,H,T] its same-topic part
    # A/w on the same-topic keys has entropy ln w - e1/w; weighted by w that is w ln w - e1
    entropy_w, entropy_c = torch.xlogy(w, w) - e1, torch.xlogy(c, c) - (e - e1)    # [B,H,T]

    n_same, same_first = same_keys(z), same[:, 0, :, 0]                            # [B,T]
    u = (n_same / (t + 1))[:, None]                                                # [B,1,T] w of uniform attention
    mixed = (u < 1).double()                                                       # queries that have a choice
    later = (t > 0).double()                                                       # content keys are 1 <= s < t
    content = (w + c - first - own) * later                                        # [B,H,T] mass on them
    content_w = (w - first * same_first[:, None] - own) * later
    content_u = content * ((n_same - 1 - same_first) / (t - 1).clamp(min=1))[:, None]

    member = F.one_hot(runs(z)[0]).double()                                        # [B,T,R]
    far = torch.mul(A, pairs, out=A1)
    blocks = member.mT[:, None] @ (far @ member[:, None])                          # [B,1,R,T] @ [B,H,T,R]
    blocks_u = member.mT @ ((pairs.double() / (t[:, None] + 1)) @ member)          # [B,R,R] of uniform attention
    topic = F.one_hot(z, n_topics).double()                                        # [B,T,K]
    return dict(
        S=S, S1=S1, n1=n1, pairs=pairs, z=z, blocks=blocks, blocks_u=blocks_u,
        topic_excess=((w - u) * mixed) @ topic, topic_mixed=(mixed @ topic)[:, 0], # [B,H,K], [B,K]
        entropy=-e.sum(-1), entropy_w=entropy_w.sum(-1), entropy_c=entropy_c.sum(-1),             # [B,H] from here
        w=w.sum(-1), c=c.sum(-1), mixed_w=(w * mixed).sum(-1), mixed_c=(c * mixed).sum(-1),
        first=first.sum(-1), own=own.sum(-1),
        content=content.sum(-1), content_w=content_w.sum(-1), content_u=content_u.sum(-1))

def add(total, part):
    """Two results of attention_sums -> that of their rows together. total may be None; neither is changed."""
    if total is None:
        return part
    assert torch.equal(total['pairs'], part['pairs']), 'sums over different pairs (T or min_distance) do not add'
    both = {}
    for key, a in total.items():
        b = part[key]
        if key.startswith('blocks'):                                               # [..., R, R] to the common R
            R = max(a.shape[-1], b.shape[-1])
            a, b = (F.pad(x, (0, R - x.shape[-1]) * 2) for x in (a, b))
        both[key] = a if key == 'pairs' else a + b if key in ('S', 'S1', 'n1') else torch.cat((a, b))
    return both

def unmasked_measures(A, z):
    """{'entropy' nats, 'within_all'} of each row and head [B,H], for any attention A [B,H,T,T], causal or not."""
    same = (z[:, :, None] == z[:, None, :])[:, None]                               # [B,1,T,T]
    return {'entropy': -torch.xlogy(A, A).sum(-1).mean(-1), 'within_all': (A * same).sum(-1).mean(-1)}

# ---------------------------------------------------------------------------------------------------------------
# attention: measures

def _numpy(x):
    return x.double().cpu().numpy()

def _log_ratio(same, other, uniform):
    return _numpy((((1 - EPS) * same + EPS * uniform) / ((1 - EPS) * other + EPS * uniform)).log())

def score_p(sums):
    """Position-matched score P [H]: topic or contiguity; 0 for any head that depends on position alone.

    P = ln [(1-eps) sum pi a1 + eps sum pi U] / [(1-eps) sum pi a0 + eps sum pi U], pi = n1 n0/(n1+n0), U = 1/(t+1),
    over `pairs`; n1, n0 rows where (t,s) is same / different, a1, a0 mean A over those. nan if no pair is both.
    """
    n, T = sums['z'].shape
    n1 = sums['n1'] * sums['pairs']                                                # [T,T]
    n0 = n * sums['pairs'] - n1
    same = (sums['S1'] * n0).sum((1, 2)) / n                                       # [H]; pi a1 = S1 n0/n
    other = ((sums['S'] - sums['S1']) * n1).sum((1, 2)) / n
    uniform = (n1 * n0 / torch.arange(1, T + 1, device=n1.device)[:, None]).sum() / n
    return _log_ratio(same, other, uniform)

def other_blocks(sums):
    """What O compares: pairs of runs j <= i-2 that share a topic in some, not all, rows with as many runs.

    A dict for each number of runs, of n rows and P pairs: q [n,P] 1 where the two share a topic, p [P] its mean; F, R
    [n,H,P] with F + R = B the block sum of A, F = c E that of the mean pattern over rows; U [n,P] that of 1/(t+1).
    """
    z, count, (start, end) = sums['z'], runs(sums['z'])[1], run_edges(sums['z'])
    mean = sums['S'] * sums['pairs'] / len(z)                                      # [H,T,T]
    box = F.pad(mean.cumsum(1).cumsum(2), (1, 0, 1, 0))                            # [H,T+1,T+1] sum of t'<t, s'<s
    groups = []
    for m in count.unique().tolist():
        rows = (count == m).nonzero()[:, 0]
        i, j = torch.tril_indices(m, m, -2, device=z.device)
        topic = z[rows].gather(1, start[rows, :m])                                 # [n,m]
        q = (topic[:, i] == topic[:, j]).double()                                  # [n,P]
        vary = (q.mean(0) > 0) & (q.mean(0) < 1)
        i, j, q = i[vary], j[vary], q[:, vary]
        (t0, t1), (s0, s1) = ((start[rows][:, r], end[rows][:, r]) for r in (i, j))              # [n,P]
        E = box[:, t1, s1] - box[:, t0, s1] - box[:, t1, s0] + box[:, t0, s0]                    # [H,n,P]
        B, U = sums['blocks'][rows][:, :, i, j], sums['blocks_u'][rows][:, i, j]
        groups.append(dict(B=B, E=E.transpose(0, 1), U=U, q=q, p=q.mean(0)))
    BE = sum((g['B'] * g['E']).sum((0, 2)) for g in groups)                        # [H]
    EE = sum((g['E'] * g['E']).sum((0, 2)) for g in groups)
    c = torch.where(EE > 0, BE / EE, 0.)[:, None]                                  # one number per head, least squares
    for g in groups:
        g['F'] = c * g.pop('E')
        g['R'] = g.pop('B') - g['F']
    return groups

def score_o(sums):
    """Other-segment score O [H]: topic, not contiguity: do blocks of one topic, apart, get more than their place says?

    O = ln [(1-eps) sum(F + R q/p) + eps sum U] / [(1-eps) sum(F + R (1-q)/(1-p)) + eps sum U] over other_blocks, first
    sums clamped at 0. nan if there are none.
    """
    same = other = uniform = 0
    for g in other_blocks(sums):
        q, p = g['q'][:, None], g['p']                                             # [n,1,P], [P]
        same = same + (g['F'] + g['R'] * q / p).sum((0, 2))                        # [H]
        other = other + (g['F'] + g['R'] * (1 - q) / (1 - p)).sum((0, 2))
        uniform = uniform + g['U'].sum()
    return _log_ratio(same.clamp(min=0), other.clamp(min=0), uniform)

def o_null(sums, draws=1000, seed=0):
    """T = sum R (q - p) [H], its sd [H] and draws [draws,H] if topics say nothing. sd is 0 where it is rounding.

    A draw exchanges whole label sequences between rows with the same number of runs, so neighbours stay distinct. It
    depends on z and seed alone: all heads and layers share it. Exact if, given their number, run lengths do not depend
    on topics. Rounding: less than 1e-5 of the block mass.
    """
    generator = torch.Generator().manual_seed(seed)
    T, drawn, mass = 0, 0, 0
    for g in other_blocks(sums):
        n, H, P = g['R'].shape
        perm = torch.rand(draws, n, generator=generator).argsort(1).to(g['R'].device)
        q = g['q'] - g['p']                                                        # [n,P]
        R = g['R'].transpose(0, 1).reshape(H, n * P)
        T = T + R @ q.view(n * P)                                                  # [H]
        drawn = drawn + q[perm].view(draws, n * P) @ R.mT                          # [draws,n*P] @ [n*P,H]
        mass = mass + (g['F'] + g['R']).sum((0, 2))
    sd = drawn.square().mean(0).sqrt()                                             # its mean is 0: q averages to p
    return _numpy(T), _numpy(torch.where(sd > 1e-5 * mass, sd, 0.)), _numpy(drawn)

def null_z_p(T, sd, draws):
    """z = T/sd and p = (1 + #{|T*| >= |T|})/(1 + draws) of each head [H], from o_null; z=0, p=1 where sd is 0."""
    z = np.divide(T, sd, out=np.zeros_like(T), where=sd > 0)
    tail = (np.abs(draws) >= np.abs(T) * (1 - 1e-9)).sum(0)                        # equal but for rounding is a tie
    return z, np.where(sd > 0, (1 + tail) / (1 + len(draws)), 1.)

def max_statistic(T, sd, draws):
    """p [H] adjusted for all heads (max-|z|): T, sd [H] and draws [draws,H] of o_null, layers joined along H."""
    live = sd > 0
    top = np.abs(draws[:, live] / sd[live]).max(1, initial=0)                      # [draws] largest |z| of any head
    tail = (top[:, None] >= np.abs(null_z_p(T, sd, draws)[0]) * (1 - 1e-9)).sum(0)
    return np.where(live, (1 + tail) / (1 + len(draws)), 1.)

def specialisation(sums):
    """Variance over topics of a head's w - u [H], less the mean squared standard error (linearised over rows).

    Queries with u < 1. About 0, also below, for a head that treats all topics alike; nan with fewer than two topics.
    """
    D, N = sums['topic_excess'], sums['topic_mixed']                               # [n,H,K], [n,K]
    rows = (N > 0).sum(0)                                                          # [K]
    D, N, rows = D[..., rows > 1], N[:, rows > 1], rows[rows > 1]                  # one row alone has no error
    if len(rows) < 2:
        return np.full(D.shape[1], np.nan)
    mean = D.sum(0) / N.sum(0)                                                     # [H,K]
    error2 = (D - mean * N[:, None]).square().sum(0) / N.sum(0) ** 2 * rows / (rows - 1)
    return _numpy(mean.var(1) - error2.mean(1))

def head_measures(sums, draws=1000, seed=0, null=None):
    """Every measure of every head of a layer: name -> float64 array [H], nan where undefined.

    Over all queries: entropy (nats), entropy_ratio (to uniform), entropy_within, entropy_cross (renormalised, weighted
    by mass), within_all, sink (s=0), self (s=t), and over keys 1 <= s < t within_content, within_content_uniform (nan
    below 0.01 of all mass). Over queries with u < 1: within, within_excess = w - u, within_cross_ratio. Then score_p,
    score_o, o_z, o_p, specialisation. null: the result of o_null, if at hand.
    """
    n, T = sums['z'].shape
    total = {k: v.sum(0) for k, v in sums.items() if v.shape == sums['w'].shape}                 # [H]
    mixed = sums['topic_mixed'].sum()                                              # queries with u < 1
    uniform_entropy = np.log(np.arange(1, T + 1)).mean()

    def share(a, b, least=1e-9):                                                   # nan where b is no mass to speak of
        return _numpy(torch.where(b > least * n * T, a / b, torch.nan))
    out = {'entropy': _numpy(total['entropy'] / (n * T)),
           'entropy_ratio': _numpy(total['entropy'] / (n * T) / uniform_entropy),
           'entropy_within': share(total['entropy_w'], total['w']),
           'entropy_cross': share(total['entropy_c'], total['c']),
           'within': _numpy(total['mixed_w'] / mixed), 'within_all': _numpy(total['w'] / (n * T)),
           'within_excess': _numpy(sums['topic_excess'].sum((0, 2)) / mixed),
           'within_cross_ratio': share(total['mixed_w'], total['mixed_c']),
           'within_content': share(total['content_w'], total['content'], 0.01),
           'within_content_uniform': share(total['content_u'], total['content'], 0.01),
           'sink': _numpy(total['first'] / (n * T)), 'self': _numpy(total['own'] / (n * T)),
           'score_p': score_p(sums), 'score_o': score_o(sums), 'specialisation': specialisation(sums)}
    out['o_z'], out['o_p'] = null_z_p(*(null or o_null(sums, draws, seed)))
    return out

# ---------------------------------------------------------------------------------------------------------------
# how much of a head's attention a pattern that knows positions alone can cover

def free_patterns(T):
    """Causal patterns without content [K,T,T], fp64, rows sum to 1; K = 15.

    With d = t-s: uniform, first (s=0), self, previous (self at t=0), 1/(d+1), the last 8/32/128 keys, exp(-d/l) for
    l = 2, 4, .., 128. Where T is short some coincide.
    """
    t = torch.arange(T)
    d = (t[:, None] - t).clamp(min=0).double()                                     # [T,T]
    weight = [torch.ones(T, T), (t == 0).expand(T, T), d == 0, d == (t[:, None] > 0), 1 / (d + 1),
              *(d < w for w in (8, 32, 128)), *(torch.exp(-d / 2 ** i) for i in range(1, 8))]
    weight = torch.stack([w.double() for w in weight]).tril()
    return weight / weight.sum(-1, keepdim=True)

def free_fit(mean):
    """Non-negative least squares of mean patterns [H,T,T] (sums['S'] / n) on free_patterns: [H,T,T], rows sum to 1.

    With X = QR the w that minimises |X w - m| also minimises |R w - Q'm|, which is K x K.
    """
    H, T, _ = mean.shape
    X = free_patterns(T).to(mean.device)                                           # [K,T,T]
    Q, R = torch.linalg.qr(X.flatten(1).mT)                                        # [T*T,K], [K,K]
    target = mean.double().flatten(1) @ Q                                          # [H,K]
    weights = np.stack([nnls(_numpy(R), y)[0] for y in _numpy(target)])            # [H,K]
    weights /= weights.sum(1, keepdims=True)                                       # so that rows of the fit sum to 1
    return torch.einsum('hk,kts->hts', torch.from_numpy(weights).to(X), X)

def overlap(A, pattern):
    """Mass that A [B,H,T,T] shares with pattern [H,T,T]: mean over queries of sum_s min(A, pattern) [B,H], 1 if equal.

    For rows the pattern was not fitted on; the ceiling is that of their mean pattern in place of the fit. What a fit
    leaves over is not topical by itself. Peak memory: A twice more in fp64.
    """
    return torch.minimum(A.double(), pattern.double()).sum(-1).mean(-1)

# ---------------------------------------------------------------------------------------------------------------
# which heads to ablate

def ablation_heads(score, entropy, k, generator):
    """Heads to ablate: score [L,H] to rank by (nan is lowest), mean entropy [L,H] -> lists of (layer, head).

    {'top': the k of highest score, 'random': k of the others drawn from a torch.Generator, 'matched': for each of the
    top in turn the other head of nearest entropy not yet taken}. The last two are shorter where others run out.
    """
    score, entropy = np.asarray(score, float), np.asarray(entropy, float)
    order = np.where(np.isnan(score), np.inf, -score).ravel().argsort(kind='stable')
    top, others = order[:k].tolist(), order[k:].tolist()
    draw = torch.randperm(len(others), generator=generator)[:k].tolist()
    matched, left = [], others.copy()
    for head in top[:len(others)]:
        nearest = min(left, key=lambda i: abs(entropy.flat[i] - entropy.flat[head]))
        left.remove(nearest)
        matched.append(nearest)
    split = lambda heads: [divmod(i, score.shape[1]) for i in heads]
    return {'top': split(top), 'random': split(others[i] for i in draw), 'matched': split(matched)}

# ---------------------------------------------------------------------------------------------------------------
# probes

def probe_tokens(n_rows, block, max_tokens, generator):
    """Tokens for a probe, split by row: half of the rows to train on, the others to test on.

    Returns train, test: sorted int64 indices [<= max_tokens/2] into [n_rows * block], drawn from a torch.Generator.
    """
    order, out = torch.randperm(n_rows, generator=generator), []
    for rows in (order[:n_rows // 2], order[n_rows // 2:]):
        tokens = (rows[:, None] * block + torch.arange(block)).flatten()           # [rows, block] -> [rows * block]
        out.append(tokens[torch.randperm(len(tokens), generator=generator)[:max_tokens // 2]].sort().values)
    return out

def _mean_sd(x):
    mean, sd = x.mean(0), x.std(0, correction=0)
    return mean, torch.where(sd > 1e-6 * mean.abs(), sd, 1.)                       # constant but for rounding

def fit_probe(x, y, C=1.0, tol=1e-4):
    """Logistic regression on standardised activations: x [n,d], topics y [n] -> (W [K,d+1] with the intercept last, the
    K topics there are, mean [d] and sd [d] of x).

    The objective and the solver of scikit-learn's LogisticRegression (multinomial, L2), its products on x's device.
    tol 1e-4 gives the converged accuracy to 0.1 points (25,000 x 512, 5 topics), 1e-3 up to a whole point less.
    """
    topics, y = y.unique(return_inverse=True)                                      # as 0..K-1
    mean, sd = _mean_sd(x)
    x, n, K = F.pad((x - mean) / sd, (0, 1), value=1.), len(y), len(topics)        # [n,d+1]
    onehot = F.one_hot(y).to(x)
    def loss(w):                                                                   # [K*(d+1)] -> J, dJ/dw in fp64
        w = torch.from_numpy(w).to(x).view(K, -1)
        l2 = w / (C * n)
        l2[:, -1] = 0                                                              # the intercepts are free
        logp = (x @ w.mT).log_softmax(1)
        J = (w * l2).sum() / 2 - (logp * onehot).sum() / n
        return J.item(), (((logp.exp() - onehot) / n).mT @ x + l2).flatten().double().cpu().numpy()
    with threadpool_limits(1, 'blas'):                                             # scipy's would get in torch's way
        w = minimize(loss, np.zeros(K * x.shape[1]), jac=True, method='L-BFGS-B',
                     options=dict(maxiter=5000, maxls=50, gtol=tol, ftol=64 * np.finfo(float).eps)).x
    return torch.from_numpy(w).to(x).view(K, -1), topics, mean, sd

def probe_guess(fitted, x):
    """The topics [n] that the probe of fit_probe names for activations x [n,d]."""
    W, topics, mean, sd = fitted
    return topics[(F.pad((x - mean) / sd, (0, 1), value=1.) @ W.mT).argmax(1)]

def probe(x_train, y_train, x_test, C=1.0, tol=1e-4):
    """The topics that a probe trained on x_train [n,d], y_train [n] names for x_test."""
    return probe_guess(fit_probe(x_train, y_train, C, tol), x_test)

def probe_directions(fitted):
    """An orthonormal basis [d,K-1], fp64, of what the probe of fit_probe reads: its weights on activations as they are
    (over sd), which L2 makes sum to 0 over topics; [d,0] where there is one topic."""
    W, topics, _, sd = fitted
    W = W[:, :-1].double() / sd.double()                                           # [K,d]
    return torch.linalg.svd(W.mT, full_matrices=False)[0][:, :len(topics) - 1]

def running_means(x, windows=(None, 8, 32, 128)):
    """Means of embeddings [B,T,d] over the last w tokens, this one included: {'all': [B,T,d], '8': ..., ...}.

    None is all tokens so far. What a probe could read without any attention to content. Sums in fp64, results as x.
    """
    T = x.shape[1]
    t = torch.arange(1, T + 1, device=x.device)
    total, out = x.double().cumsum(1), {}                                          # [B,T,d]
    for w in windows:
        n = t.clamp(max=w or T)                                                    # [T] tokens in the mean
        before = F.pad(total, (0, 0, w or T, 0))[:, :T]                            # w tokens ago: 0 where t < w
        out[str(w or 'all')] = ((total - before) / n[:, None]).to(x)
    return out

def control_labels(vocab, n_topics, seed):
    """A control task (Hewitt & Liang 2019): one random label < n_topics for each token type, int64 [vocab].

    A probe learns it by remembering tokens only; selectivity is the accuracy on topics less the accuracy on this.
    """
    return torch.randint(n_topics, (vocab,), generator=torch.Generator().manual_seed(seed))

def posterior_r2(x_train, p_train, x_test, p_test, floor=1e-4, ridge=1e-6):
    """R^2 on test tokens of log posteriors from activations: x [n,d], p [n,K] clipped below at floor, a float.

    Least squares on standardised x, on x's device in fp64; squares pooled over the K outputs, against the train mean.
    ridge, in units of the inputs' variance, is for directions that do not vary.
    """
    y_train, y_test = (p.to(x_train.device).double().clamp(min=floor).log() for p in (p_train, p_test))
    x_train, x_test = x_train.double(), x_test.double()
    (mean, sd), center = _mean_sd(x_train), y_train.mean(0)
    x = (x_train - mean) / sd                                                      # [n,d]
    gram = x.mT @ x + ridge * len(x) * torch.eye(x.shape[1]).to(x)
    w = torch.linalg.solve(gram, x.mT @ (y_train - center))                        # [d,K]
    error = y_test - center - (x_test - mean) / sd @ w                             # [n,K]
    return (1 - error.square().sum() / (y_test - center).square().sum()).item()

def majority(y_train, y_test):
    """Accuracy of always naming the most frequent training topic."""
    return float((y_test == np.bincount(y_train).argmax()).mean())

def token_identity(x_train, y_train, x_test, y_test, vocab):
    """Accuracy of naming each token's most frequent training topic: tokens x [n] < vocab, topics y [n].

    It is what can be known without context. Unseen tokens, and ties, get the majority topic.
    """
    counts = np.zeros((vocab, int(y_train.max()) + 1))
    np.add.at(counts, (x_train, y_train), 1)
    tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1                     # an unseen token ties all topics
    guess = np.where(tied, counts.sum(0).argmax(), counts.argmax(1))
    return float((guess[x_test] == y_test).mean())

def bag_of_tokens(x, z, train, test, vocab, C=10.0):
    """Accuracy of naming a token's topic from the tokens so far in its row, this one included, as a bag, a float.

    Logistic regression (scikit-learn) on log(1 + count), rows of unit length: what the words tell without a model of
    language. tokens x < vocab and topics z [n_rows,T]; train, test: indices into n_rows x T, of different rows.
    """
    T, parts = x.shape[1], []
    for at in (train, test):
        rows, ends = np.divmod(at, T)
        indptr = np.concatenate([[0], np.cumsum(ends + 1)])
        where = np.repeat(rows * T - indptr[:-1], ends + 1) + np.arange(indptr[-1])        # each token's whole past
        bag = csr_matrix((np.ones(indptr[-1], np.float32), x.ravel()[where], indptr), (len(at), vocab))
        bag.sum_duplicates()
        bag.data = np.log1p(bag.data)
        parts.append(normalize(bag))
    y_train, y_test = z.ravel()[train], z.ravel()[test]
    if len(np.unique(y_train)) == 1:
        return majority(y_train, y_test)
    return float(LogisticRegression(C=C, tol=1e-3, max_iter=300).fit(parts[0], y_train).score(parts[1], y_test))

def posterior_accuracy(posterior, y):
    """Accuracy of the Bayes filter's best guess, a probe's ceiling: posterior [..., K], topics y [...]."""
    return float((np.asarray(posterior).argmax(-1) == np.asarray(y)).mean())

def by_distance(correct, distance):
    """Accuracy in bins 0, 1, 2-3, 4-7, ..., 128 and up of the distance from the last boundary (-1 is left out).

    correct, distance [n] -> {'distance': lower edges, 'accuracy', 'count'}, lists; accuracy None where a bin is empty.
    """
    which = np.digitize(np.asarray(distance).ravel(), BINS) - 1
    parts = [np.asarray(correct).ravel()[which == k] for k in range(len(BINS))]
    return {'distance': list(BINS), 'accuracy': [float(x.mean()) if len(x) else None for x in parts],
            'count': [len(x) for x in parts]}

# ---------------------------------------------------------------------------------------------------------------
# circuits: weights are [out, in], as in Hugging Face; query head h reads kv head h // (H/K)

def rotation(position, head_dim, theta=1e6):
    """RoPE's R(position) [head_dim, head_dim], fp64: i and i + head_dim/2 turn by position theta^(-2i/head_dim)."""
    angle = position * theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # [head_dim/2]
    cos, sin = angle.cos().diag(), angle.sin().diag()
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

def _svd(X, Y):
    """U [H,n,r], S [H,r], V [H,n,r] of X_h' Y_g from X [H,d,n], Y [K,d,n], r = min(d,n): with X' = Qx Rx, Y' = Qy Ry
    the singular values are those of the small Rx Ry', and its vectors are turned by Qx and Qy."""
    (Qx, Rx), (Qy, Ry) = torch.linalg.qr(X.mT), torch.linalg.qr(Y.mT)              # [.,n,r], [.,r,d]
    Qy, Ry = (y.repeat_interleave(len(X) // len(Y), 0) for y in (Qy, Ry))
    U, S, Vh = torch.linalg.svd(Rx @ Ry.mT)
    return Qx @ U, S, Qy @ Vh.mT

def qk_svd(W_Q, W_K, g1, gq, gk, distance=0, theta=1e6):
    """Singular vectors of queries U [H,n_embd,r], values S [H,r] and vectors of keys V [H,n_embd,r], r = min(head_dim,
    n_embd), of diag(g1) W_Q' diag(gq) R(-distance) diag(gk) W_K diag(g1), head by head.

    W_Q [H*head_dim, n_embd], W_K [K*head_dim, n_embd]; gains g1 [n_embd] of the norm before, gq, gk [head_dim] of
    QK-Norm. Scores are this form up to positive factors per token: compare shapes, not scales. No RoPE: distance 0.
    Factored as in Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits).
    """
    d, n = len(gq), len(g1)
    Q = gq.double()[:, None] * (W_Q.double() * g1.double()).view(-1, d, n)         # [H,d,n]
    K = gk.double()[:, None] * (W_K.double() * g1.double()).view(-1, d, n)         # [K,d,n]
    return _svd(rotation(-distance, d, theta).to(Q.device).mT @ Q, K)

def ov_svd(W_O, W_V, g1, head_dim):
    """Singular vectors written U [H,n_embd,r], values S [H,r] and vectors read V [H,n_embd,r] of W_O W_V diag(g1) by
    head; W_O [n_embd, H*head_dim], W_V [K*head_dim, n_embd]."""
    d, n = head_dim, len(g1)
    return _svd(W_O.double().mT.reshape(-1, d, n), (W_V.double() * g1.double()).view(-1, d, n))

def alignment(vectors, basis):
    """Share of the squared norm of the first m singular vectors [H,n,r] that lies in an orthonormal basis [n,m]: [H].

    Random directions give m/n, the same subspace 1; nan where m is 0. What would fool it: residual streams are far
    from isotropic, and all that reads or writes may share their large directions; see the same at initialisation.
    """
    m = basis.shape[1]
    return (basis.mT @ vectors[..., :m]).square().sum((-2, -1)) / m                # [H,m,m]

def effective_rank(s):
    """exp(H(s^2 / sum s^2)) of singular values [..., r]: 1 for rank one, r for a flat spectrum."""
    p = s ** 2 / (s ** 2).sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()
