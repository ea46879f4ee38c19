"""The measures of attention clustering, as pure functions of arrays: analyze.py feeds them, plot.py draws them.

    topics     runs of a row, what uniform attention gives, distance from the last boundary
    attention  attention_sums per batch -> add -> head_measures: entropy, within mass, P, O with its null
    probes     logistic regression on activations, and the references to read its accuracy by
    circuits   singular values of QK and OV, from the factors

A[t,s] is the attention of query t on key s, z[t] the topic of token t, and a run a maximal stretch of one topic.
Everything is summed in fp64, so a head that ignores the tokens scores P = 0 to rounding. Rows are the unit of every
error: the tokens of a row share its few runs, and errors per token come out several times too small.
"""
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

EPS = 0.01                           # uniform attention mixed into P and O: a head without far mass scores 0, not 0/0
BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128)                                   # lower edges of the distances from a boundary

# ---------------------------------------------------------------------------------------------------------------------
# topics

def runs(z):
    """Topics [B,T] -> index of each token's run [B,T] from 0, and the number of runs of each row [B]."""
    run = torch.zeros_like(z, dtype=torch.long)
    run[:, 1:] = (z[:, 1:] != z[:, :-1]).cumsum(1)
    return run, run[:, -1] + 1

def run_edges(z):
    """Topics [B,T] -> where each run starts, ends (exclusive), both [B,R], R the most runs of a row. Missing runs: T, T."""
    run, count = runs(z)
    index = torch.arange(int(count.max()), device=z.device)
    end = (run[:, :, None] <= index).sum(1)                                                           # [B,T,R] -> [B,R]
    start = (run[:, :, None] < index).sum(1)
    return start, end

def same_keys(z):
    """Topics [B,T] -> the number of keys s <= t of the query's own topic [B,T]; the query counts itself."""
    z = z.long()
    seen = torch.nn.functional.one_hot(z).cumsum(1)                                                              # [B,T,K]
    return seen.gather(2, z[:, :, None])[:, :, 0]

def uniform_measures(z, causal=True):
    """What uniform attention gives on rows of topics z [B,T]: {'entropy' nats, 'within', 'within_all'}, floats.

    'within' is nan if every query sees its own topic alone. causal=False: uniform over all T keys, as in the old log.
    """
    B, T = z.shape
    n_keys = torch.arange(1, T + 1, device=z.device).double() if causal else torch.full((T,), T).double().to(z.device)
    same = same_keys(z) if causal else (z[:, :, None] == z[:, None, :]).sum(2)
    u = same / n_keys                                                                                              # [B,T]
    return {'entropy': n_keys.log().mean().item(), 'within': u[u < 1].mean().item(), 'within_all': u.mean().item()}

def distance_from_boundary(z):
    """Topics [B,T] -> tokens since the start of the current run [B,T]; -1 in the first run, which no boundary opens."""
    run, _ = runs(z)
    start, _ = run_edges(z)
    t = torch.arange(z.shape[1], device=z.device)
    return torch.where(run > 0, t - start.gather(1, run), -1)

# ---------------------------------------------------------------------------------------------------------------------
# attention: sums over batches of rows

def attention_sums(A, z, n_topics, min_distance=16):
    """All that the measures of one layer need from a batch of rows; `add` combines batches.

    A [B,H,T,T] causal attention (rows sum to 1), z [B,T] topics in 0..n_topics-1. Returns a dict of tensors on A's
    device: S, S1 [H,T,T] and n1 [T,T] summed over rows (all, and those in which t and s share a topic); everything else
    one entry per row, [B,...]; `pairs` [T,T], the pairs P and O look at. Takes about four times the memory of A in fp64.
    """
    B, H, T, _ = A.shape
    A, z = A.double(), z.long()
    t = torch.arange(T, device=A.device)
    pairs = (t[:, None] - t >= min_distance) & (t >= 1)                            # [T,T] no local keys, no sink
    same = (z[:, :, None] == z[:, None, :]).double()[:, None]                      # [B,1,T,T]

    A1 = A * same
    S, S1, n1 = A.sum(0), A1.sum(0), same.sum((0, 1))
    w, first, own = A1.sum(-1), A[..., 0], A.diagonal(dim1=-2, dim2=-1)            # [B,H,T] mass on: topic, s=0, s=t
    c = (A.sum(-1) - w).clamp(min=0)                                               # [B,H,T] mass on other topics
    AlogA = torch.xlogy(A, A, out=A1)                                              # 0 ln 0 = 0
    e = AlogA.sum(-1)
    e1 = AlogA.mul_(same).sum(-1)

    # A renormalised on its same-topic keys has entropy ln w - e1/w; weighted by the mass w it is w ln w - e1
    entropy_w, entropy_c = torch.xlogy(w, w) - e1, torch.xlogy(c, c) - (e - e1)    # [B,H,T]

    # u: the share of the query's keys that uniform attention would find in its topic. content: keys 1 <= s < t
    n_same, same_first = same_keys(z), same[:, 0, :, 0]                            # [B,T]
    u = n_same / (t + 1)
    mixed = (n_same < t + 1).double()                                              # queries with a choice, u < 1
    u_content = (n_same - 1 - same_first) / (t - 1).clamp(min=1)
    later = (t > 0).double()                                                       # at t=0 the query is the sink
    content = (w + c - first - own) * later                                        # [B,H,T]
    content_same = (w - first * same_first[:, None] - own) * later

    # block sums over the pairs of runs (i of the query, j of the key); uniform attention goes along as one more head
    run, count = runs(z)
    member = torch.nn.functional.one_hot(run).double()                             # [B,T,R]
    far = torch.mul(A, pairs, out=A1)
    blocks = member.mT[:, None] @ (far @ member[:, None])                          # [B,1,R,T] @ [B,H,T,R] -> [B,H,R,R]
    blocks_u = member.mT @ ((pairs / (t[:, None] + 1.0).double()) @ member)        # [B,R,R]

    topic = torch.nn.functional.one_hot(z, n_topics).double()                      # [B,T,K]
    excess = (w - u[:, None]) * mixed[:, None]                                     # [B,H,T]
    return dict(
        S=S, S1=S1, n1=n1, pairs=pairs, z=z, blocks=blocks, blocks_u=blocks_u,
        entropy=-e.sum(-1), entropy_w=entropy_w.sum(-1), entropy_c=entropy_c.sum(-1),
        w=w.sum(-1), c=c.sum(-1), first=first.sum(-1), own=own.sum(-1),
        mixed_w=(w * mixed[:, None]).sum(-1), mixed_c=(c * mixed[:, None]).sum(-1), mixed=mixed.sum(-1),
        content=content.sum(-1), content_w=content_same.sum(-1), content_u=(content * u_content[:, None]).sum(-1),
        topic_excess=excess @ topic, topic_mixed=(mixed[:, None] @ topic)[:, 0])   # [B,H,K], [B,K]

def add(total, part):
    """Two results of attention_sums -> that of their rows together. total may be None; neither is changed."""
    if total is None:
        return part
    both = {}
    for key, a in total.items():
        b = part[key]
        if key in ('S', 'S1', 'n1'):
            both[key] = a + b
        elif key == 'pairs':
            assert torch.equal(a, b), 'sums over different pairs (another T or min_distance) do not add'
            both[key] = a
        else:
            if key in ('blocks', 'blocks_u'):                                      # [..., R, R] to the common R
                R = max(a.shape[-1], b.shape[-1])
                a, b = (torch.nn.functional.pad(x, (0, R - x.shape[-1]) * 2) for x in (a, b))
            both[key] = torch.cat((a, b))
    return both

def unmasked_measures(A, z):
    """{'entropy' nats, 'within_all'} per row and head [B,H], of any attention A [B,H,T,T], causal or not."""
    same = (z[:, :, None] == z[:, None, :])[:, None]                               # [B,1,T,T]
    return {'entropy': -torch.xlogy(A, A).sum(-1).mean(-1), 'within_all': (A * same).sum(-1).mean(-1)}

# ---------------------------------------------------------------------------------------------------------------------
# attention: from sums to measures

def score_p(sums):
    """Position-matched score P [H]: topic or contiguity, exactly 0 for any head that depends on position alone.

    With n1, n0 the rows in which pair (t,s) is same / different and a1, a0 the mean attention over those,
    P = ln [(1-eps) sum pi a1 + eps sum pi U] / [(1-eps) sum pi a0 + eps sum pi U], pi = n1 n0/(n1+n0), U = 1/(t+1).
    nan if no pair is same in one row and different in another.
    """
    n, T = sums['z'].shape
    n1 = sums['n1'] * sums['pairs']                                                # [T,T]
    n0 = n * sums['pairs'] - n1
    uniform = (n1 * n0 / n / torch.arange(1, T + 1, device=n1.device)[:, None]).sum()
    same = (sums['S1'] * n0 / n).sum((1, 2))                                       # [H] pi a1 = n0 S1 / n: no division by 0
    other = ((sums['S'] - sums['S1']) * n1 / n).sum((1, 2))
    return _numpy((((1 - EPS) * same + EPS * uniform) / ((1 - EPS) * other + EPS * uniform)).log())

def other_blocks(sums):
    """What O compares: pairs of runs j <= i-2 that share a topic in some, not all, rows of as many runs.

    One dict for every number of runs: F, R [n,H,P] the block sums expected of the mean pattern and what is left,
    B = F + R; U [n,P]; q [n,P] 1 where the runs share a topic; p [P] its mean. n rows with that number of runs, P pairs.
    """
    z, H = sums['z'], len(sums['S'])
    count, (start, end) = runs(z)[1], run_edges(z)
    mean = sums['S'] * sums['pairs'] / len(z)                                      # [H,T,T]
    box = torch.nn.functional.pad(mean.cumsum(1).cumsum(2), (1, 0, 1, 0))          # [H,T+1,T+1] sums over t' < t, s' < s
    groups = []
    for m in count.unique().tolist():
        rows = (count == m).nonzero()[:, 0]
        i, j = torch.tril_indices(m, m, -2, device=z.device)
        topic = z[rows].gather(1, start[rows, :m])                                 # [n,m]
        q = (topic[:, i] == topic[:, j]).double()                                  # [n,P]
        vary = (q.mean(0) > 0) & (q.mean(0) < 1)
        i, j, q = i[vary], j[vary], q[:, vary]
        t0, t1, s0, s1 = start[rows][:, i], end[rows][:, i], start[rows][:, j], end[rows][:, j]     # [n,P]
        E = (box[:, t1, s1] - box[:, t0, s1] - box[:, t1, s0] + box[:, t0, s0]).transpose(0, 1)     # [H,n,P] -> [n,H,P]
        groups.append(dict(B=sums['blocks'][rows][:, :, i, j], E=E, U=sums['blocks_u'][rows][:, i, j], q=q, p=q.mean(0)))
    BE = sum((g['B'] * g['E']).sum((0, 2)) for g in groups)                        # [H]
    EE = sum((g['E'] * g['E']).sum((0, 2)) for g in groups)
    c = torch.where(EE > 0, BE / EE, 0.).view(1, H, 1)                             # least squares: how much of E is there
    for g in groups:
        g['F'] = c * g.pop('E')
        g['R'] = g.pop('B') - g['F']
    return groups

def score_o(sums):
    """Other-segment score O [H]: topic, not contiguity; do blocks of one topic, apart, get more than their place says?

    O = ln [(1-eps) sum(F + R q/p) + eps sum U] / [(1-eps) sum(F + R (1-q)/(1-p)) + eps sum U], sums before U clamped
    at 0, over other_blocks. nan if there are none.
    """
    same = other = uniform = 0
    for g in other_blocks(sums):
        q, p = g['q'][:, None], g['p']                                             # [n,1,P], [P]
        same = same + (g['F'] + g['R'] * q / p).sum((0, 2))                        # [H]
        other = other + (g['F'] + g['R'] * (1 - q) / (1 - p)).sum((0, 2))
        uniform = uniform + g['U'].sum()
    same, other = same.clamp(min=0), other.clamp(min=0)
    return _numpy((((1 - EPS) * same + EPS * uniform) / ((1 - EPS) * other + EPS * uniform)).log())

def o_null(sums, draws=1000, seed=0):
    """T = sum R (q - p) of each head [H], its sd [H] and draws [draws,H] when topics say nothing.

    A draw exchanges the whole label sequences between rows with the same number of runs, so neighbours stay distinct. Draws
    depend on seed and z alone: heads and layers on the same rows share them. sd is 0 where it is rounding (1e-5 of the
    block mass). Exact if labels and run lengths are independent given the number of runs; otherwise approximate.
    """
    generator = torch.Generator().manual_seed(seed)
    T, drawn, mass = 0, 0, 0
    for g in other_blocks(sums):
        n, H, P = g['R'].shape
        perm = torch.rand(draws, n, generator=generator).argsort(1).to(g['R'].device)
        q = g['q'] - g['p']                                                        # [n,P]
        R = g['R'].transpose(0, 1).reshape(H, n * P)
        T = T + R @ q.reshape(n * P)                                               # [H]
        drawn = drawn + q[perm].reshape(draws, n * P) @ R.mT                       # [draws,n*P] @ [n*P,H] -> [draws,H]
        mass = mass + (g['F'] + g['R']).sum((0, 2))
    sd = drawn.square().mean(0).sqrt()                                             # its mean is 0: q averages to p
    return _numpy(T), _numpy(torch.where(sd > 1e-5 * mass, sd, 0.)), _numpy(drawn)

def null_z_p(T, sd, draws):
    """z = T/sd and two-sided p = (1 + #{|T*| >= |T|})/(1 + draws) per head [H], from o_null; z=0, p=1 where sd is 0."""
    z = np.divide(T, sd, out=np.zeros_like(T), where=sd > 0)
    tail = (np.abs(draws) >= np.abs(T) * (1 - 1e-9)).sum(0)                        # equal but for rounding is a tie
    return z, np.where(sd > 0, (1 + tail) / (1 + len(draws)), 1.)

def max_statistic(T, sd, draws):
    """p [H] adjusted for all H heads: how often the largest |z| of any head reaches this one's (Westfall-Young).

    Give it the heads of all layers at once: T, sd [H] and draws [N,H] of o_null, joined over layers along H.
    """
    z, live = null_z_p(T, sd, draws)[0], sd > 0
    top = np.abs(draws[:, live] / sd[live]).max(1, initial=0)                      # [N]
    tail = (top[:, None] >= np.abs(z) * (1 - 1e-9)).sum(0)
    return np.where(live, (1 + tail) / (1 + len(draws)), 1.)

def specialisation(sums):
    """Variance over topics of a head's within excess w - u [H], less what noise alone gives: the mean squared standard
    error, linearised over rows. About 0 if all topics are treated alike, so it may be negative. nan below two topics."""
    D, N = sums['topic_excess'], sums['topic_mixed']                               # [n,H,K], [n,K]
    rows = (N > 0).sum(0)                                                          # [K]
    D, N, rows = D[..., rows > 1], N[:, rows > 1], rows[rows > 1]                  # one row alone has no error
    mean = D.sum(0) / N.sum(0)                                                     # [H,K]
    error2 = (D - mean * N[:, None]).square().sum(0) / N.sum(0) ** 2 * rows / (rows - 1)
    many = mean.shape[1] > 1
    return _numpy(mean.var(1) - error2.mean(1)) if many else np.full(len(mean), np.nan)

def head_measures(sums, draws=1000, seed=0, null=None):
    """Every measure of every head of a layer: name -> float64 array [H]. nan where undefined (JSON null later).

    entropy (nats, mean over queries), entropy_ratio (over uniform), entropy_within, entropy_cross (nats, renormalised,
    weighted by mass); within, within_excess = w - u, within_cross_ratio: queries with u < 1; within_all: all queries;
    within_content, within_content_uniform: all queries, keys 1 <= s < t, nan below 0.01 of the mass; sink, self: mass on
    s=0 and s=t; score_p, score_o, o_z, o_p, specialisation. null: a result of o_null, if at hand.
    """
    n, T = sums['z'].shape
    queries = n * T
    total = {k: v.sum(0) for k, v in sums.items() if v.dim() == 2 and k not in ('z', 'n1', 'pairs', 'topic_mixed')}  # [H]
    mixed = sums['mixed'].sum()
    u = same_keys(sums['z']) / torch.arange(1, T + 1, device=mixed.device)         # [n,T]
    ratio = lambda a, b, least=1e-9: _numpy(torch.where(b > least * queries, a / b, torch.nan))     # least mass per query
    out = dict(
        entropy=_numpy(total['entropy'] / queries),
        entropy_ratio=_numpy(total['entropy'] / queries / torch.arange(1, T + 1).double().log().mean().to(mixed)),
        entropy_within=ratio(total['entropy_w'], total['w']), entropy_cross=ratio(total['entropy_c'], total['c']),
        within=_numpy(total['mixed_w'] / mixed), within_all=_numpy(total['w'] / queries),
        within_excess=_numpy((total['mixed_w'] - u[u < 1].sum()) / mixed),
        within_cross_ratio=ratio(total['mixed_w'], total['mixed_c']),
        within_content=ratio(total['content_w'], total['content'], 0.01),
        within_content_uniform=ratio(total['content_u'], total['content'], 0.01),
        sink=_numpy(total['first'] / queries), self=_numpy(total['own'] / queries),
        score_p=score_p(sums), score_o=score_o(sums), specialisation=specialisation(sums))
    out['o_z'], out['o_p'] = null_z_p(*(null or o_null(sums, draws, seed)))
    return out

def _numpy(x):
    return x.double().cpu().numpy()

# ---------------------------------------------------------------------------------------------------------------------
# probes

def probe_tokens(n_rows, block, max_tokens, generator):
    """Token indices for a probe, split by row: half of the rows to train on, the others to test on.

    Returns train, test: int64 [<= max_tokens/2] sorted indices into an array [n_rows * block]; drawn from a
    torch.Generator. No row is in both: tokens of one row share its topics, and a probe would only recognise the row.
    """
    order = torch.randperm(n_rows, generator=generator)
    halves = order[:n_rows // 2], order[n_rows // 2:]
    out = []
    for rows in halves:
        tokens = (rows[:, None] * block + torch.arange(block)).flatten()                                # [rows * block]
        keep = torch.randperm(len(tokens), generator=generator)[:max_tokens // 2]
        out.append(tokens[keep].sort().values)
    return out

def probe(x_train, y_train, x_test, seed=0):
    """Multinomial logistic regression on standardised activations: x [n,d], y [n] topics -> predicted topics of x_test."""
    if len(np.unique(y_train)) == 1:
        return np.full(len(x_test), y_train[0])
    scale = StandardScaler().fit(x_train)
    model = LogisticRegression(C=1.0, tol=1e-3, max_iter=5000, random_state=seed)
    return model.fit(scale.transform(x_train), y_train).predict(scale.transform(x_test))

def majority(y_train, y_test):
    """Accuracy of always naming the most frequent training topic."""
    return float((y_test == np.bincount(y_train).argmax()).mean())

def token_identity(x_train, y_train, x_test, y_test, vocab):
    """Accuracy of naming each token's most frequent training topic; unseen tokens and ties get the majority topic.

    x tokens [n] < vocab, y topics [n]. It is what a probe can know without any context.
    """
    counts = np.zeros((vocab, int(y_train.max()) + 1))
    np.add.at(counts, (x_train, y_train), 1)
    overall = counts.sum(0).argmax()
    best = counts.argmax(1)
    tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1                     # an unseen token ties all topics
    return float((np.where(tied, overall, best)[x_test] == y_test).mean())

def posterior_accuracy(posterior, y):
    """Accuracy of the Bayes filter's best guess, a probe's ceiling: posterior [..., K], y [...] topics."""
    return float((np.asarray(posterior).argmax(-1) == np.asarray(y)).mean())

def by_distance(correct, distance):
    """Accuracy by distance from the last boundary, bins 0, 1, 2-3, 4-7, ..., 128 and up, named by their lower edge.

    correct [n] 0/1, distance [n] from distance_from_boundary (-1 is left out) -> {'distance', 'accuracy', 'count'}, lists;
    accuracy None where a bin is empty.
    """
    correct, distance = np.asarray(correct).ravel(), np.asarray(distance).ravel()
    bin_ = np.digitize(distance, BINS) - 1                                         # -1 below 0
    parts = [correct[bin_ == k] for k in range(len(BINS))]
    return {'distance': list(BINS), 'accuracy': [float(x.mean()) if len(x) else None for x in parts],
            'count': [len(x) for x in parts]}

# ---------------------------------------------------------------------------------------------------------------------
# circuits: weights in Hugging Face's orientation, [out, in]; query head h reads kv head h // (H/K)

def rotation(position, head_dim, theta=1e6):
    """RoPE's R(position) [head_dim, head_dim], fp64: dimension i turns with i + head_dim/2, at position * theta^(-2i/head_dim)."""
    angle = position * theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)       # [head_dim/2]
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

def qk_spectrum(W_Q, W_K, g1, gq, gk, distance=0, theta=1e6):
    """Singular values [H, head_dim] of diag(g1) W_Q' diag(gq) R(-distance) diag(gk) W_K diag(g1), head by head.

    W_Q [H*head_dim, n_embd], W_K [K*head_dim, n_embd]; gains g1 [n_embd] of the norm before attention, gq, gk [head_dim] of
    QK-norm. Scores are this form up to positive factors per token, so compare shapes, not scales. Without RoPE: distance 0.
    """
    d, n = len(gq), W_Q.shape[1]
    Q = gq.double()[:, None] * (W_Q.double() * g1.double()).view(-1, d, n)         # [H,d,n]
    K = gk.double()[:, None] * (W_K.double() * g1.double()).view(-1, d, n)         # [K,d,n]
    R = rotation(-distance, d, theta).to(Q.device)
    return _spectrum(R.mT @ Q, K)

def ov_spectrum(W_O, W_V, g1, head_dim):
    """Singular values [H, head_dim] of W_O W_V diag(g1), head by head: W_O [n_embd, H*head_dim], W_V [K*head_dim, n_embd]."""
    n = W_O.shape[0]
    O = W_O.double().mT.reshape(-1, head_dim, n)                                   # [H,d,n]
    V = (W_V.double() * g1.double()).view(-1, head_dim, n)                         # [K,d,n]
    return _spectrum(O, V)

def _spectrum(X, Y):
    """Singular values of X_h' Y_g: with X' = Qx Rx and Y' = Qy Ry they are those of the small Rx Ry'. X [H,d,n], Y [K,d,n]."""
    Rx, Ry = (torch.linalg.qr(M.mT, mode='r').R for M in (X, Y))                   # [H,d,d], [K,d,d] upper triangles
    return torch.linalg.svdvals(Rx @ Ry.repeat_interleave(len(Rx) // len(Ry), 0).mT)

def effective_rank(s):
    """exp(H(s^2 / sum s^2)) of singular values [..., r]: 1 for rank one, r for a flat spectrum."""
    p = s ** 2 / (s ** 2).sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()
