"""Tests of measures.py, on attention made by hand and on rows of topics like the project's."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import analyze
import data_synth
import measures as M
from configurator import configure
from test_train import HERE

def make_rows(n, T=128, K=5, seed=0, min_run=16, repeats=False, merged=0):
    """Topics [n, T] of the group chain: 2-5 segments; the topics up to `merged` are one, so they are not as likely."""
    rng = np.random.default_rng(seed)
    lengths = data_synth.draw_segments(rng, 'group', n, T, 2, 5, min_run)
    return torch.from_numpy(data_synth.draw_topics(rng, lengths, K, repeats).astype(int)).clamp(min=merged)

KINDS = [dict(), dict(repeats=True), dict(merged=1)]

def normalise(weight):
    weight = weight.tril().double()
    return weight / weight.sum(-1, keepdim=True)

def distances(T):
    return (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0).double()

def run_heads(z):
    """Heads that see boundaries but no topics: own run, .3 of it per boundary, the run before [B, 3, T, T]."""
    run, _ = M.runs(z)
    gap = (run[:, :, None] - run[:, None, :]).clamp(min=0)
    own = (gap == 0).double()
    before = (gap == 1) + own * (run == 0)[:, :, None]
    return torch.stack([normalise(w) for w in (own, 0.3 ** gap, before)], 1)

def topic_heads(z):
    """All of the topic; in other runs only (or self); +.1, +.3 log-odds on a decay of 64; -.9 [B, 5, T, T]."""
    run, _ = M.runs(z)
    same = (z[:, :, None] == z[:, None, :]).double()
    apart = (same * (run[:, :, None] != run[:, None, :])).tril()
    apart = apart + torch.eye(z.shape[1]) * (apart.sum(-1, keepdim=True) == 0)
    near = (-distances(z.shape[1]) / 64).exp()
    heads = same, apart, near * (0.1 * same).exp(), near * (0.3 * same).exp(), 1 - 0.6 * same
    return torch.stack([normalise(w) for w in heads], 1)

def causal(z):
    return torch.ones(z.shape[1], z.shape[1]).tril().bool()

def streamed(heads, z, batch=4):
    """attention_sums of patterns heads(z), batch by batch."""
    total = None
    for part in z.split(batch):
        total = M.add(total, M.attention_sums(heads(part), part, causal(part)))
    return total

def measured(sums, draws=10):
    """All measures of the heads, without the last, uniform attention."""
    return {name: x[:-1].numpy() for name, x in M.head_measures(sums, draws, seed=0).items()}

def slow_by_query(A, z, allowed):
    """All but P and O of one head, A [n, T, T]; scipy's entropy normalises, over an axis."""
    same = (z[:, :, None] == z[:, None]) & allowed
    n_keys, w, o = allowed.sum(-1), (A * same).sum(-1), (A * ~same).sum(-1)
    mixed = same.sum(-1) < n_keys
    within, cross = (np.nan_to_num(stats.entropy(A * part, axis=-1)) for part in (same, ~same))      # nan: no mass
    return {
        'entropy': stats.entropy(A, axis=-1).mean(), 'entropy_within': np.average(within, weights=w),
        'entropy_cross': np.average(cross, weights=o), 'within': w[mixed].mean(), 'within_all': w.mean(),
        'within_cross_ratio': w[mixed].sum() / o[mixed].sum(), 'sink': A[:, :, 0].mean(),
        'self': np.diagonal(A, axis1=1, axis2=2).mean()}

def slow_ratio(same, other, floor):
    return np.log((.99 * max(same, 0) + .01 * floor) / (.99 * max(other, 0) + .01 * floor))

def slow_p(A, z, pairs, uniform):
    """P and the excess mass."""
    m, sums = (A * pairs).sum(2), np.zeros(3)
    for t, s in np.argwhere(pairs):
        same = z[:, t] == z[:, s]
        share = m[same, t].sum() / m[:, t].sum()
        chance = same.sum() * (~same).mean() * uniform[t, s]
        sums += A[same, t, s].sum() * (1 - share), A[~same, t, s].sum() * share, chance
    return slow_ratio(*sums), (sums[0] - sums[1]) / z.size

def slow_o(A, z, pairs, uniform):
    """O and its T."""
    edges = [[0, *np.flatnonzero(np.diff(row)) + 1, len(row)] for row in z]
    runs, cells = [[slice(*ends) for ends in zip(edge, edge[1:])] for edge in edges], []
    for b, mine in enumerate(runs):
        mates = [a for a, other in enumerate(runs) if len(other) == len(mine)]
        for i, j in np.argwhere(np.tri(len(mine), k=-2)):
            alike = {a: z[a, runs[a][i].start] == z[a, runs[a][j].start] for a in mates}
            p = np.mean([*alike.values()])
            if 0 < p < 1:
                masses = [(x * pairs)[mine[i], mine[j]].sum() for x in (A[b], A.mean(0), uniform)]
                cells.append((*masses, alike[b], p))
    B, E, U, q, p = np.array(cells).T
    fit = E * (B @ E) / (E @ E)
    R = B - fit
    return slow_ratio((fit + R * q / p).sum(), (fit + R * (1 - q) / (1 - p)).sum(), U.sum()), (R * (q - p)).sum()

FULL = torch.ones(40, 40).bool()
ALLOWED = {'causal': FULL.tril(), 'the last 8': FULL.tril().triu(-7), 'everything': FULL}

@pytest.mark.parametrize('keys', ALLOWED)
@pytest.mark.parametrize('kind', KINDS)
def test_every_measure_equals_the_slow_version(kind, keys):
    z = make_rows(24, T=40, K=3 + kind.get('merged', 0), min_run=3, seed=5, **kind)
    allowed = ALLOWED[keys]
    same = (z[:, :, None] == z[:, None, :])[:, None]
    noise = 2 * torch.randn(24, 3, 40, 40, generator=torch.Generator().manual_seed(0)).double()
    A = (noise + same * torch.tensor([0., 1, 6]).view(3, 1, 1)).masked_fill(~allowed, -torch.inf).softmax(-1)
    sums = M.attention_sums(A, z, allowed, min_distance=4)
    fast, blocks, uniform = measured(sums), M.other_blocks(sums), M.head_measures(sums, 10, seed=0)
    A, z, allowed = A.numpy(), z.numpy(), allowed.numpy()
    pairs = allowed & np.tri(40, k=-4, dtype=bool) & (np.arange(40) >= 1)
    u = allowed / allowed.sum(1, keepdims=True)
    for h in range(3):
        slow = slow_by_query(A[:, h], z, allowed)
        slow['score_p'], slow['excess_mass'] = slow_p(A[:, h], z, pairs, u)
        slow['score_o'], slow_t = slow_o(A[:, h], z, pairs, u)
        assert (blocks.R[h] @ blocks.d).item() == pytest.approx(slow_t, rel=1e-9)
        assert set(slow) | {'o_z', 'o_p'} == set(fast)
        for name, value in slow.items():
            assert fast[name][h] == pytest.approx(value, rel=1e-8, abs=1e-12), name
    for name, value in slow_by_query(np.broadcast_to(u, (24, 40, 40)), z, allowed).items():
        assert uniform[name][-1].item() == pytest.approx(value, rel=1e-12, nan_ok=True), name

def gated(A, gate):
    """Patterns A [B, H, T, T] times gate [B, 1 or H, T], the rest of the mass on the sink."""
    A = A * gate[..., None]
    A[..., 0] += 1 - A.sum(-1)
    return A

@pytest.mark.parametrize('kind', KINDS)
def test_position_alone_scores_zero(kind):
    """30 random preferences; for P also where topic, boundary and chance decide how much of a query's mass goes
    anywhere but to the sink."""
    z, g = make_rows(100, seed=1, **kind), torch.Generator().manual_seed(0)
    anywhere = normalise(torch.rand(1, 30, 128, 128, generator=g))
    out = measured(streamed(lambda z: anywhere.expand(len(z), -1, -1, -1), z), 100)
    assert (np.abs(out['score_p']) < 1e-12).all() and (np.abs(out['score_o']) < 1e-12).all()
    assert (out['o_z'] == 0).all() and (out['o_p'] == 1).all()
    def heads(z):
        near = torch.sigmoid(2 - M.distance_from_boundary(z) / 16) * (1 + z) / 5
        return gated(anywhere, near[:, None] * torch.rand(len(z), 30, 128, generator=g))
    assert (np.abs(measured(streamed(heads, z))['score_p']) < 1e-12).all()

def test_p_of_planted_topic_heads():
    """Log-odds c on the query's topic, on a decay of 64; last, .3 in a head that goes to the sink past a boundary."""
    def heads(z):
        same = (z[:, :, None] == z[:, None]).double()
        A = torch.stack([normalise((c * same - distances(256) / 64).exp()) for c in (-3, -1, -.3, .3, 1, 3)], 1)
        after = M.distance_from_boundary(z)                      # -1 before the first
        return torch.cat((A, gated(A[:, 3:4], (0.02 + 0.98 * ((after >= 0) & (after < 16)))[:, None])), 1)
    samples = [measured(streamed(heads, make_rows(400, T=256, min_run=32, seed=k)))['score_p'] for k in range(3)]
    *P, past = np.mean(samples, 0)
    assert P == pytest.approx([-1.17, -.45, -.14, .14, .46, 1.49], abs=0.05)
    assert past == pytest.approx(P[3], abs=0.02)

@pytest.mark.parametrize('repeats', [False, True])
def test_null_is_calibrated(repeats):
    """300 draws of 60 rows, a head that leaks over boundaries and one of noise: p uniform. Topical heads are found;
    boundaries move P and leave O alone."""
    g, found = torch.Generator().manual_seed(7), []
    for draw, z in enumerate(make_rows(300 * 60, T=48, min_run=6, seed=7, repeats=repeats).split(60)):
        noise = normalise(torch.randn(60, 1, 48, 48, generator=g).exp())
        A = torch.cat((run_heads(z)[:, 1:], noise), 1)
        score, p = M.o_null(M.other_blocks(M.attention_sums(A, z, causal(z), min_distance=4)), 199, seed=draw)
        assert p[1] == 1                                         # the run before reaches no other: sd is rounding
        found.append((score[[0, 2]], p[[0, 2]]))
    for score, p in np.array(found).transpose(2, 1, 0):          # two heads, [300] each
        assert stats.kstest(p, 'uniform').pvalue > 0.01 / 2
        assert abs(score.mean()) < 0.2 and abs(score.std() - 1) < 0.2
    z = make_rows(400, T=256, min_run=32, seed=4, repeats=repeats)
    out = measured(streamed(topic_heads, z), 1000)
    assert (out['o_z'][:4] > 4).all() and out['o_z'][4] < -4 and (out['o_p'] < 0.005).all()
    P, O = out['score_p'], out['score_o']
    assert (P[:2] > 2).all() and (O[:2] > 4).all() and (O[2:4] > 0.05).all()
    out = measured(streamed(run_heads, z), 1000)                 # own run, leaking past it, the runs before: no topic
    P, O, oz = (np.array(out[key])[:3] for key in ('score_p', 'score_o', 'o_z'))
    assert P[0] > 4 and 0.2 < P[1] < 0.6 and P[2] < -0.4
    assert (np.abs(O) < 0.04).all() and (np.abs(oz) < 3).all()

def test_undefined_is_nan():
    def self_alone(z):
        return torch.eye(z.shape[1]).double().expand(len(z), 1, -1, -1)
    for heads in (self_alone, topic_heads):                      # the first of these: no mass on others
        out = measured(streamed(heads, make_rows(60, seed=6)))
        assert np.isnan(out['within_cross_ratio'][0]) and np.isnan(out['entropy_cross'][0])
    out = measured(streamed(self_alone, torch.zeros(4, 32, dtype=torch.long)))          # one topic, no choice
    for key in ('within', 'within_cross_ratio', 'score_p', 'score_o', 'entropy_cross'):
        assert np.isnan(out[key]).all()
    assert (out['o_p'] == 1).all() and (out['o_z'] == 0).all() and (out['within_all'] > 1 - 1e-6).all()
    assert analyze.outcome(2.5, {'bigram': 2.0, 'filter': 2.0})['gap_closed'] is None       # there is none to close

def test_distances():
    z = torch.tensor([[3, 3, 1, 1, 1, 3], [0, 0, 0, 0, 0, 0]])
    assert M.distance_from_boundary(z).tolist() == [[-1, -1, 0, 1, 2, 0], [-1] * 6]
    distance = np.array([-1, 0, 1, 2, 3, 4, 7, 8, 127, 128, 500, -1])
    out = M.by_distance(np.array([0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0], bool), distance)
    assert np.array_equal(out, [1, 0, .5, 1, 0, np.nan, np.nan, 1, .5], equal_nan=True)

def test_error_over_rows():
    """The jackknife's error of P and of excess mass is the spread over samples of rows, of any head."""
    found = []
    for k in range(40):
        z = make_rows(80, T=64, min_run=8, seed=k)
        sums = [[M.attention_sums(topic_heads(z[g::8]), z[g::8], causal(z)) for g in range(8)]]
        found.append((analyze.scores(sums, range(8)), analyze.row_errors(sums)))
    whole, errors = (torch.stack(x)[:, :, 0] for x in zip(*found))             # [40, 2, H]
    spread = whole.std(0)
    moving = spread > 1e-9
    assert ((errors.square().mean(0).sqrt() / spread)[moving] - 1).abs().max() < 0.35 and moving.any(1).all()

def test_reliability():
    """Noise as large as the profile, on each half: r = 1/2, so 2/3 for all rows. The level of a layer says nothing."""
    profile, level, *noise = torch.randn(4, 40, 100, generator=torch.Generator().manual_seed(0))
    noise = torch.stack(noise) + 9 * level[:, :1]
    assert M.reliability(profile + noise).item() == pytest.approx(2 / 3, abs=0.03) and M.reliability(noise) < 0.05
    assert M.reliability(torch.stack((profile, -profile))) == 0 and M.reliability(noise[:, :1, :1]) == 0

def test_bigram_references():
    """A seed of config/structured.py, against the mean of 8."""
    cfg = configure('data_synth.py', [f'{HERE}/config/structured.py', '--seed=1'])
    _, *search, _, val_stream = data_synth.make_chains(cfg, 'cpu')
    drawn = data_synth.draw_rows(cfg, val_stream, 1000, data_synth.VAL_SEGMENTS, *search)
    tokens, z = (torch.from_numpy(x[:400, :-1].astype(int)) for x in drawn)
    rows = SimpleNamespace(tokens=tokens, topics=z, batches=torch.arange(400).split(20))
    found = analyze.bigram_references(rows, data_synth.parameters(cfg), causal(z))
    for name, P, O in (('equal', .138, .216), ('posterior', .201, .290)):
        assert {k: x.item() for k, x in found[name].items()} == pytest.approx({'score_p': P, 'score_o': O}, abs=0.02)

def test_cka_is_that_of_gram_matrices():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 8, generator=g) + 5
    Y = X[:, :5] + torch.randn(60, 5, generator=g)
    H = torch.eye(60) - 1 / 60
    K, L = (H @ (x @ x.mT) @ H for x in (X, Y))
    assert M.cka(X, Y) == pytest.approx(((K * L).sum() / (K.norm() * L.norm())).item(), rel=1e-4) and M.cka(X, Y) < 0.9
    assert M.cka(X, 3 * X @ torch.linalg.qr(torch.randn(8, 8, generator=g)).Q + 7) == pytest.approx(1, abs=1e-5)

@pytest.mark.parametrize('n_rows, max_tokens', [(11, 60), (4, 10 ** 6)])
def test_probe_tokens_share_no_row(n_rows, max_tokens):
    masks, again = (M.probe_tokens(n_rows, 16, max_tokens, torch.Generator().manual_seed(0)) for _ in range(2))
    assert masks.shape == (2, n_rows, 16) and torch.equal(masks, again)
    assert (masks.any(2).sum(0) <= 1).all()
    for mask, k in zip(masks, (n_rows // 2, n_rows - n_rows // 2)):
        assert mask.sum() == min(max_tokens // 2, 16 * k)

@pytest.mark.filterwarnings('error')
def test_probe_is_scikit_learns(n=2000, d=64, K=5):
    """On tensors as on arrays, whatever the scale of an activation; topics need not be 0..K-1, and may be one."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, K, n)
    x = (0.3 * rng.normal(size=(K, d))[y] + 3 * rng.normal(size=(n, d)) + 10) * np.logspace(-3, 3, d)
    (train, test), y = x.astype(np.float32).reshape(2, n // 2, d), y[:n // 2]
    expected = make_pipeline(StandardScaler(), LogisticRegression(max_iter=15_000)).fit(train, y).predict(test)
    x_train, y_train, x_test = map(torch.from_numpy, (train, y, test))
    assert (M.probe(x_train, 2 * y_train + 1, x_test).numpy() == 2 * expected + 1).mean() > 0.99
    assert (M.probe(x_train, 0 * y_train + 3, x_test) == 3).all()

def test_references():
    labels, again, other = (M.control_labels(5000, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(labels, again) and not torch.equal(labels, other)
    assert labels.shape == (5000,) and stats.chisquare(labels.bincount()).pvalue > 0.01 and labels.max() == 4
    x, y = torch.tensor([0, 0, 0, 1, 1, 2, 3]), torch.tensor([1, 1, 0, 2, 2, 0, 1])
    assert M.majority(y, torch.tensor([1, 1, 0, 2])) == 0.5
    # token 0 -> 1, 1 -> 2, 2 -> 0, 3 -> 1, 4 unseen -> 1; then a tie, which falls back on the majority as well
    assert M.token_identity(x, torch.arange(5), y, torch.tensor([1, 2, 0, 1, 1]), 6, 3) == 1
    x, y = (torch.cat([old, torch.tensor([2])]) for old in (x, y))
    assert M.token_identity(x, torch.tensor([2, 2, 5, 0]), y, torch.tensor([1, 1, 0, 0]), 6, 3) == 0.5
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
            assert rank[h].item() == pytest.approx(np.exp(stats.entropy(power)), rel=1e-9)
