"""Tests of measures.py, on attention made by hand and on rows of topics like the project's."""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import measures as M

torch.set_num_threads(1)                                         # small tensors: more threads only wait

def make_rows(n, T=128, K=5, seed=0, min_run=16, weights=None, repeats=False):
    """Topics [n, T]: 2-5 segments, lengths a uniform composition; neighbours distinct, or drawn anew (repeats)."""
    rng = np.random.default_rng(seed)
    z = np.empty((n, T), dtype=np.int64)
    for row in z:
        m = rng.integers(2, 6)
        cuts = np.sort(rng.choice(T - m * min_run + m - 1, m - 1, replace=False)) - np.arange(m - 1)
        lengths = np.diff([0, *cuts, T - m * min_run]) + min_run
        topics = []
        for _ in range(m):
            p = np.array(weights or [1] * K, float)
            if topics and not repeats:
                p[topics[-1]] = 0
            topics.append(rng.choice(K, p=p / p.sum()))
        row[:] = np.repeat(topics, lengths)
    return torch.from_numpy(z)

KINDS = [dict(), dict(repeats=True), dict(weights=(4, 2, 1, 1, .5))]
VOCAB = 512

def draw_tokens(z, own, seed=0):
    """Tokens [n, T]: any, whatever the topic, but a share `own` from the topic's own fifth of the vocabulary."""
    rng = np.random.default_rng(seed)
    of_topic = z.numpy() * (VOCAB // 5) + rng.integers(VOCAB // 5, size=z.shape)
    anywhere = rng.integers(VOCAB, size=z.shape)
    return torch.from_numpy(np.where(rng.random(z.shape) < own, of_topic, anywhere))

def normalise(weight):
    weight = weight.tril().double()
    return weight / weight.sum(-1, keepdim=True)

def distances(T):
    t = torch.arange(T)
    return (t[:, None] - t).clamp(min=0).double()

def position_heads(z):
    """Heads that depend on position alone [B, 8, T, T]."""
    T = z.shape[1]
    d, s = distances(T), torch.arange(T).double().expand(T, T)
    uniform, sink, own, window = torch.ones(T, T), s == 0, s == s.mT, d < 8
    previous = (d == 1) + own * sink
    fixed = (s == 10) + 1e-3 * own
    decay_sink = (-d / 32).exp() + 20 * sink
    wave = 1 + torch.cos(d / 5) * torch.cos(s / 7)
    heads = uniform, sink, previous, own, window, fixed, decay_sink, wave
    return torch.stack([normalise(w) for w in heads]).expand(len(z), -1, -1, -1)

def run_heads(z):
    """Heads that see boundaries but no topics: own run, .3 of it per boundary, the run before [B, 3, T, T]."""
    run, _ = M.runs(z)
    gap = (run[:, :, None] - run[:, None, :]).clamp(min=0)
    own = (gap == 0).double()
    before = (gap == 1) + own * (run == 0)[:, :, None]
    return torch.stack([normalise(w) for w in (own, 0.3 ** gap, before)], 1)

def token_heads(x, affinity):
    """Log weights affinity [H, V, V] of key token on query token x [B, T], on a decay of 64 -> [B, H, T, T]."""
    weight = affinity.double().exp()[:, x[:, :, None], x[:, None, :]]          # [H, B, T, T]
    return normalise(weight.transpose(0, 1) * (-distances(x.shape[1]) / 64).exp())

def topic_heads(z):
    """All of the topic; in other runs only (or self); +.1, +.3 log-odds on a decay of 64; -.9 [B, 5, T, T]."""
    run, _ = M.runs(z)
    same = (z[:, :, None] == z[:, None, :]).double()
    apart = (same * (run[:, :, None] != run[:, None, :])).tril()
    apart = apart + torch.eye(z.shape[1]) * (apart.sum(-1, keepdim=True) == 0)
    near = (-distances(z.shape[1]) / 64).exp()
    heads = same, apart, near * (0.1 * same).exp(), near * (0.3 * same).exp(), 1 - 0.6 * same
    return torch.stack([normalise(w) for w in heads], 1)

def streamed(heads, *rows, batch=4, **kw):
    """attention_sums of patterns heads(*rows), batch by batch; rows: topics z [n, T], what else heads read."""
    total = None
    for part in zip(*(r.split(batch) for r in rows)):
        total = M.add(total, M.attention_sums(heads(*part), part[0], **kw))
    return total

def measured(sums, draws=10):
    return M.head_measures(sums, M.o_null(sums, draws))

# -----------------------------------------------------------------------------
# slow, independent versions

def slow_by_query(A, z, allowed):
    """All but P and O of one head, A [n, T, T]; scipy's entropy normalises, over an axis."""
    same = (z[:, :, None] == z[:, None]) & allowed
    n_keys, w, o = allowed.sum(-1), (A * same).sum(-1), (A * ~same).sum(-1)
    mixed = same.sum(-1) < n_keys
    whole = stats.entropy(A, axis=-1).mean()
    within, cross = (np.nan_to_num(stats.entropy(A * part, axis=-1)) for part in (same, ~same))      # nan: no mass
    return {
        'entropy': whole, 'entropy_ratio': whole / np.log(n_keys).mean(),
        'entropy_within': np.average(within, weights=w), 'entropy_cross': np.average(cross, weights=o),
        'within': w[mixed].mean(), 'within_all': w.mean(), 'within_cross_ratio': w[mixed].sum() / o[mixed].sum(),
        'sink': A[:, :, 0].mean(), 'self': np.diagonal(A, axis1=1, axis2=2).mean()}

def slow_ratio(same, other, floor):
    return math.log((.99 * max(same, 0) + .01 * floor) / (.99 * max(other, 0) + .01 * floor))

def slow_p(A, z, pairs, uniform):
    sums = np.zeros(3)
    for t, s in np.argwhere(pairs):
        same = z[:, t] == z[:, s]
        if same.any() and not same.all():
            pi = same.sum() * (~same).sum() / len(z)
            sums += pi * np.array([A[same, t, s].mean(), A[~same, t, s].mean(), uniform[t, s]])
    return slow_ratio(*sums)

def slow_o(A, z, pairs, uniform):
    """O and its T."""
    parts, cells = [], []
    for row in z:
        edge = [0, *np.flatnonzero(np.diff(row)) + 1, len(row)]
        parts.append([(slice(a, b), row[a]) for a, b in zip(edge, edge[1:])])
    for b, mine in enumerate(parts):
        mates = [other for other in parts if len(other) == len(mine)]
        for i, j in np.argwhere(np.tri(len(mine), k=-2)):
            p = np.mean([other[i][1] == other[j][1] for other in mates])
            if 0 < p < 1:
                block = mine[i][0], mine[j][0]
                masses = [(x * pairs)[block].sum() for x in (A[b], A.mean(0), uniform)]
                cells.append((*masses, mine[i][1] == mine[j][1], p))
    B, E, U, q, p = np.array(cells).T
    F = E * (B @ E) / (E @ E)
    R = B - F
    return slow_ratio((F + R * q / p).sum(), (F + R * (1 - q) / (1 - p)).sum(), U.sum()), (R * (q - p)).sum()

FULL = torch.ones(40, 40).bool()
ALLOWED = {'causal': None, 'the last 8': FULL.tril().triu(-7), 'everything': FULL}

@pytest.mark.parametrize('keys', ALLOWED)
@pytest.mark.parametrize('kind', [dict(), dict(repeats=True), dict(weights=(3, 2, 1))])
def test_every_measure_equals_the_slow_version(kind, keys):
    z = make_rows(24, T=40, K=3, min_run=3, seed=3, **kind)
    allowed = FULL.tril() if keys == 'causal' else ALLOWED[keys]
    same = (z[:, :, None] == z[:, None, :])[:, None]
    noise = 2 * torch.randn(24, 3, 40, 40, generator=torch.Generator().manual_seed(0)).double()
    A = (noise + same * torch.tensor([0., 1, 6]).view(3, 1, 1)).masked_fill(~allowed, -torch.inf).softmax(-1)
    sums = M.attention_sums(A, z, ALLOWED[keys], min_distance=4)
    fast, (fast_t, _, _), uniform = measured(sums), M.o_null(sums, 10), M.uniform_measures(z, ALLOWED[keys])
    A, z, allowed = A.numpy(), z.numpy(), allowed.numpy()
    pairs = allowed & np.tri(40, k=-4, dtype=bool) & (np.arange(40) >= 1)
    u = allowed / allowed.sum(1, keepdims=True)
    for h in range(3):
        slow = slow_by_query(A[:, h], z, allowed) | {'score_p': slow_p(A[:, h], z, pairs, u)}
        slow['score_o'], slow_t = slow_o(A[:, h], z, pairs, u)
        assert fast_t[h] == pytest.approx(slow_t, rel=1e-9)
        assert set(slow) | {'o_z', 'o_p'} == set(fast)
        for name, value in slow.items():
            assert fast[name][h] == pytest.approx(value, rel=1e-8, abs=1e-12), name
    slow = slow_by_query(np.broadcast_to(u, (24, 40, 40)), z, allowed)
    assert uniform == pytest.approx({key: slow[key] for key in ('entropy', 'within', 'within_all')}, rel=1e-12)

# -----------------------------------------------------------------------------
# P and O: what they find and what they leave alone

@pytest.mark.parametrize('kind', KINDS)
def test_position_alone_scores_zero(kind):
    out = measured(streamed(position_heads, make_rows(100, T=256, min_run=32, seed=1, **kind)), 100)
    assert (np.abs(out['score_p']) < 1e-12).all() and (np.abs(out['score_o']) < 1e-12).all()
    assert (out['o_z'] == 0).all() and (out['o_p'] == 1).all()

@pytest.mark.parametrize('repeats', [False, True])
def test_topic_blind_heads_leave_o_alone(repeats):
    """Boundaries move P, not O. A taste for tokens moves neither; for equal ones, if tokens tell the topic."""
    z = make_rows(400, T=256, min_run=32, seed=2, repeats=repeats)
    taste = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
    affinity = torch.stack((taste, 4 * torch.eye(VOCAB)))                      # a random table; equal tokens
    def heads(z, blind, telling):
        return torch.cat((run_heads(z), token_heads(blind, affinity), token_heads(telling, affinity)), 1)
    out = measured(streamed(heads, z, draw_tokens(z, 0), draw_tokens(z, 0.5)), 1000)
    P, O, oz = (out[k] for k in ('score_p', 'score_o', 'o_z'))
    assert P[0] > 4 and 0.2 < P[1] < 0.6 and P[2] < -0.4         # own, leaking, before
    assert (np.abs(P[3:6]) < 0.01).all() and (np.abs(O[3:6]) < 0.01).all()     # tastes; tokens that do not tell
    assert (np.abs(oz[:6]) < 3).all() and (np.abs(O[:6]) < 0.04).all()
    assert oz[0] == 0 and oz[2] == 0                             # they reach no run but one
    assert oz[6] > 4 and P[6] > 0.02 and O[6] > 0.02

@pytest.mark.parametrize('kind', KINDS)
def test_topical_heads_are_found(kind):
    out = measured(streamed(topic_heads, make_rows(400, T=256, min_run=32, seed=4, **kind)), 1000)
    P, O, z = out['score_p'], out['score_o'], out['o_z']
    assert (z[:4] > 4).all() and z[4] < -4 and (out['o_p'] < 0.005).all()
    assert P[0] > 4 and O[0] > 4 and P[1] > 2 and O[1] > 4 and P[4] < -0.3 and O[4] < -0.3
    assert 0.03 < P[2] < 0.1 and 0.05 < O[2] < 0.12 and 0.1 < P[3] < 0.3 and 0.15 < O[3] < 0.35

@pytest.mark.parametrize('repeats', [False, True])
def test_null_is_calibrated(repeats):
    """300 draws of 60 rows, run and token heads: p uniform for each, and the max-statistic keeps its level."""
    rows = make_rows(300 * 60, T=48, min_run=6, seed=7, repeats=repeats)
    tokens = draw_tokens(rows, 0), draw_tokens(rows, 0.5)
    affinity = 1.5 * torch.randn(1, VOCAB, VOCAB, generator=torch.Generator().manual_seed(7))
    p_values, z_values, any_head = [], [], 0
    for draw, (z, *seen) in enumerate(zip(*(r.split(60) for r in (rows, *tokens)))):
        A = torch.cat((run_heads(z)[:, 1:], *(token_heads(x, affinity) for x in seen)), 1)
        null = M.o_null(M.attention_sums(A, z, min_distance=4), 199, seed=draw)
        (score, p), adjusted = M.null_z_p(*null), M.max_statistic(*null)
        assert (adjusted >= p - 1e-12).all() and p[1] == 1       # the run before reaches no other: sd is rounding
        p_values.append(p[[0, 2, 3]])
        z_values.append(score[[0, 2, 3]])
        any_head += adjusted.min() <= 0.1
    for p in np.stack(p_values, 1):
        assert stats.kstest(p, 'uniform').pvalue > 0.01 / 3      # three heads
    assert (abs(np.mean(z_values, 0)) < 0.2).all() and (abs(np.std(z_values, 0) - 1) < 0.2).all()
    assert stats.binomtest(any_head, 300, 0.1).pvalue > 0.01

def test_null_draws_by_hand():
    """Three rows, one pair each: T* takes the values of R . q[perm], each as often; heads share draws."""
    z = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4, [0] * 4 + [1] * 4 + [2] * 4, [2] * 4 + [0] * 4 + [1] * 4])
    A = normalise(torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0)))
    sums = M.attention_sums(A, z, min_distance=2)
    R = M.other_blocks(sums).R[0].numpy()
    _, _, draws = M.o_null(sums, draws=600)
    for value in R - R.sum() / 3:
        assert 150 < np.isclose(draws[:, 0], value).sum() < 250
    assert np.allclose(M.o_null(M.attention_sums(A[:, 1:], z, min_distance=2), 600)[2][:, 0], draws[:, 1])
    assert not np.allclose(M.o_null(sums, 600, seed=1)[2], draws)

def test_p_and_max_statistic():
    draws = np.array([[-3 * (1 - 1e-13), 1], [2.9, 0], [4, 5], [0, -3.5]])     # a tie but for rounding counts
    T, sd, level = np.array([3., 0]), np.array([1.5, 1]), np.array([1.5, np.inf])      # inf: rounding
    z, p = M.null_z_p(T + [0, 9], level, draws)
    assert z.tolist() == [2, 0] and p.tolist() == [3 / 5, 1]
    assert M.max_statistic(T + [0, 9], level, draws).tolist() == [3 / 5, 1]
    assert M.max_statistic(T, sd, draws).tolist() == [4 / 5, 1]                # max |z*|: 2, 1.9, 5, 3.5

def test_batches_add_up_and_inputs_are_left_alone():
    z = make_rows(45, seed=8)
    z = z[M.runs(z)[1].argsort()]                                # the first batch has fewer runs than the second
    A = torch.cat((topic_heads(z), run_heads(z)), 1)
    before, once = A.clone(), measured(M.attention_sums(A, z), 50)
    part, rest = M.attention_sums(A[:20], z[:20]), M.attention_sums(A[20:], z[20:])
    kept = {key: torch.stack(list(value)) for key, value in part.items()}
    for key, value in measured(M.add(part, rest), 50).items():
        assert np.allclose(value, once[key], equal_nan=True), key
    assert torch.equal(A, before) and all(torch.equal(kept[key], torch.stack(list(part[key]))) for key in part)
    with pytest.raises(AssertionError, match='different pairs'):
        M.add(part, M.attention_sums(A, z, min_distance=8))

def test_undefined_is_nan():
    z = make_rows(60, seed=6)
    for heads, h in ((position_heads, 3), (topic_heads, 0)):     # self and own topic: no mass on others
        out = measured(streamed(heads, z))
        assert np.isnan(out['within_cross_ratio'][h]) and np.isnan(out['entropy_cross'][h])
    out = measured(streamed(position_heads, torch.zeros(4, 32, dtype=torch.long)))      # one topic, no choice
    undefined = 'within', 'within_cross_ratio', 'score_p', 'score_o', 'entropy_cross'
    assert all(np.isnan(out[key]).all() for key in undefined)
    assert (out['o_p'] == 1).all() and (out['o_z'] == 0).all() and (out['within_all'] > 1 - 1e-6).all()

def test_runs_and_distances():
    z = torch.tensor([[3, 3, 1, 1, 1, 3], [0, 0, 0, 0, 0, 0]])
    run, count = M.runs(z)
    assert run.tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6] and count.tolist() == [3, 1]
    assert M.distance_from_boundary(z).tolist() == [[-1, -1, 0, 1, 2, 0], [-1] * 6]
    distance = np.array([-1, 0, 1, 2, 3, 4, 7, 8, 127, 128, 500, -1])
    out = M.by_distance(np.array([0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0]), distance)
    assert out == {'distance': [0, 1, 2, 4, 8, 16, 32, 64, 128], 'accuracy': [1, 0, .5, 1, 0, None, None, 1, .5]}

# -----------------------------------------------------------------------------
# probes and circuits

@pytest.mark.parametrize('n_rows, max_tokens', [(11, 60), (4, 10 ** 6)])
def test_probe_tokens_share_no_row(n_rows, max_tokens):
    parts, again = (M.probe_tokens(n_rows, 16, max_tokens, torch.Generator().manual_seed(0)) for _ in range(2))
    rows = [set((x // 16).tolist()) for x in parts]
    assert not rows[0] & rows[1] and rows[0] | rows[1] <= set(range(n_rows))
    for part, k in zip(parts, (n_rows // 2, n_rows - n_rows // 2)):
        assert len(part) == len(part.unique()) == min(max_tokens // 2, 16 * k)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('n, d, K', [(2000, 64, 5), (1000, 200, 3), (600, 100, 8)])
def test_probe_is_scikit_learns(n, d, K):
    """The guesses of LogisticRegression but for the few on a border, more than a wrong penalty would leave."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, K, n)
    scale = np.logspace(-3, 3, d)                                # standardising must undo this
    x = (0.3 * rng.normal(size=(K, d))[y] + 3 * rng.normal(size=(n, d))) * scale + 10 * scale
    x[:, 7] = 0.1
    train, test = torch.from_numpy(x.astype(np.float32)).chunk(2)
    y = torch.from_numpy(y[:n // 2])
    unit = StandardScaler().fit(train)
    guess = M.probe(train, y, test)
    same = {}
    for C in (1.0, 0.01):
        model = LogisticRegression(C=C, tol=1e-4, max_iter=5000).fit(unit.transform(train), y)
        same[C] = (guess.numpy() == model.predict(unit.transform(test))).mean()
    assert same[1.0] > 0.99 and same[1.0] > same[0.01] + 0.005
    assert torch.equal(M.probe(train, y * 2 + 1, test), guess * 2 + 1)         # topics need not be 0..K-1
    assert (M.probe(train, torch.full_like(y, 3), test) == 3).all()

def test_references():
    state, labels = torch.get_rng_state(), M.control_labels(5000, 5, seed=1)
    assert labels.dtype == torch.int64 and torch.equal(state, torch.get_rng_state())
    again, other = M.control_labels(5000, 5, 1), M.control_labels(5000, 5, 2)
    assert torch.equal(labels, again) and not torch.equal(labels, other)
    assert labels.shape == (5000,) and stats.chisquare(labels.bincount()).pvalue > 0.01 and labels.max() == 4
    x, y = np.array([0, 0, 0, 1, 1, 2, 3]), np.array([1, 1, 0, 2, 2, 0, 1])
    assert M.majority(y, np.array([1, 1, 0, 2])) == 0.5
    # token 0 -> 1, 1 -> 2, 2 -> 0, 3 -> 1, 4 unseen -> 1; a tie falls back on the majority as well
    assert M.token_identity(x, y, np.array([0, 1, 2, 3, 4]), np.array([1, 2, 0, 1, 1]), 6) == 1
    tied = np.append(x, 2), np.append(y, 2)
    assert M.token_identity(*tied, np.array([2, 2, 5, 0]), np.array([0, 1, 0, 0]), 6) == 0.25
    x = 5 + torch.randn(2, 150, 3, generator=torch.Generator().manual_seed(0))
    for window in (1, 8, 32, 200):                               # a window longer than the row is all of it
        slow = torch.stack([x[:, max(t + 1 - window, 0):t + 1].mean(1) for t in range(150)], 1)
        assert torch.allclose(M.running_mean(x, window), slow, atol=1e-5)
    assert torch.equal(M.running_mean(x), M.running_mean(x, 32)) and M.running_mean(x).dtype == x.dtype

@pytest.mark.parametrize('H, K, d, n', [(4, 4, 8, 32), (6, 2, 8, 40), (4, 2, 16, 12)])
def test_ranks_equal_those_of_dense_matrices(H, K, d, n):
    g = torch.Generator().manual_seed(0)
    shapes = (H * d, n), (K * d, n), (K * d, n), (n, H * d), (n,), (d,), (d,)
    W_Q, W_K, W_V, W_O, g1, gq, gk = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    qk, ov = M.qk_rank(W_Q, W_K, g1, gq, gk), M.ov_rank(W_O, W_V, g1, d)
    assert qk.shape == ov.shape == (H,)
    for h in range(H):
        mine, read = (slice(i * d, (i + 1) * d) for i in (h, h // (H // K)))
        dense_qk = (gq[:, None] * W_Q[mine] * g1).T @ (gk[:, None] * W_K[read] * g1)
        dense_ov = W_O[:, mine] @ W_V[read] @ torch.diag(g1)
        for rank, dense in ((qk, dense_qk), (ov, dense_ov)):
            power = torch.linalg.svdvals(dense)[:min(d, n)].square()
            assert rank[h].item() == pytest.approx(math.exp(stats.entropy(power)), rel=1e-9)
