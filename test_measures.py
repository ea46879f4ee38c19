"""Tests of measures.py, on attention made by hand and on rows of topics like the project's."""
import math
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import nnls
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.preprocessing import StandardScaler
import data_synth
import measures as M
from configurator import configure

torch.set_num_threads(1)                                         # small tensors: more threads only wait

# ---------------------------------------------------------------------------------------------------------------------
# rows and heads by hand

def make_rows(n, T=128, K=5, seed=0, min_run=16, weights=None, repeats=False, segments=(2, 5)):
    """Topics [n,T]: 2-5 segments, uniform composition of the rest; neighbours distinct, or drawn anew and so merged."""
    rng = np.random.default_rng(seed)
    z = np.empty((n, T), dtype=np.int64)
    for row in z:
        m = rng.integers(segments[0], segments[1] + 1)
        cuts = np.sort(rng.choice(T - m * min_run + m - 1, m - 1, replace=False)) - np.arange(m - 1)
        lengths = np.diff([0, *cuts, T - m * min_run]) + min_run
        at, last = 0, -1
        for length in lengths:
            p = np.ones(K) if weights is None else np.array(weights, float)
            if last >= 0 and not repeats:
                p[last] = 0
            last = rng.choice(K, p=p / p.sum())
            row[at:at + length] = last
            at += length
    return torch.from_numpy(z)

def normalise(weight):
    weight = weight.tril().double()
    return weight / weight.sum(-1, keepdim=True)

CASES = ['range', 'range repeats', 'group', 'group repeats']
VOCAB = {'range': 515, 'group': 512}                             # 512 tokens that occur

def synth_rows(case, n=400, T=256, seed=0):
    """Rows of data_synth.py, 2-5 segments of at least T/8 -> topics, segment of each token, tokens: int64 [n,T]."""
    chain, repeats = case.split()[0], 'repeats' in case
    cfg = configure('data_synth.py', ['--device=cpu', f'--chain={chain}', f'--vocab_size={VOCAB[chain]}'])
    tables, rows, tokens = np.random.SeedSequence(seed).spawn(3)
    _, sums, row_of = data_synth.make_tables(cfg, tables)
    rng = np.random.default_rng(rows)
    lengths = data_synth.draw_segments(rng, chain, n, T, 2, 5, T // 8)
    topics = data_synth.draw_topics(rng, lengths, cfg.n_topics, repeats)
    first = data_synth.N_SPECIAL if chain == 'range' else 0
    x = data_synth.draw_tokens(tokens, torch.from_numpy(sums), torch.from_numpy(row_of), first, topics)
    segment = (np.arange(T) >= lengths.cumsum(1)[:, :, None]).sum(1)                       # [n,5,T] -> [n,T]
    return [torch.from_numpy(a.astype(np.int64)) for a in (topics, segment, x)]

def decay(T, length):
    t = torch.arange(T)
    return torch.exp(-(t[:, None] - t).clamp(min=0).double() / length)

def position_heads(T):
    t = torch.arange(T)
    d = (t[:, None] - t).clamp(min=0).double()
    first, s = (t == 0).double().expand(T, T), t.double().expand(T, T)
    heads = dict(
        uniform=torch.ones(T, T), sink=first, previous=(d == 1) + 0. + (d == 0) * (t[:, None] == 0),
        self=(d == 0).double(), window8=(d < 8).double(), window32=(d < 32).double(),
        decay8=decay(T, 8), decay32=decay(T, 32), decay128=decay(T, 128), harmonic=1 / (d + 1),
        early=torch.exp(-s / 20), fixed=(s == 10) + 1e-3 * (d == 0), decay_sink=decay(T, 32) + 20 * first,
        wave=1 + torch.cos(d / 5) * torch.cos(s / 7))
    return list(heads), torch.stack([normalise(w) for w in heads.values()])                                 # [H,T,T]

def on_rows(pattern, n):
    return pattern[None].expand(n, *pattern.shape)

def segment_heads(segment):
    """Heads that see boundaries but no topics: own segment, .3 of it per boundary, the segment before [B,3,T,T]."""
    gap = (segment[:, :, None] - segment[:, None, :]).clamp(min=0)
    own = (gap == 0).double()
    before = (gap == 1) + own * (segment == 0)[:, :, None]
    return torch.stack([normalise(w) for w in (own, 0.3 ** gap, before)], 1)

def token_heads(x, affinity):
    """Log weights affinity [H,V,V] of key token on query token, on a decay of 64; tokens x [B,T] -> [B,H,T,T]."""
    weight = affinity.double().exp()[:, x[:, :, None], x[:, None, :]]                      # [H,B,T,T]
    return normalise(weight.transpose(0, 1) * decay(x.shape[1], 64))

def topic_heads(z):
    """All past of the topic; that in other runs only (or self); +0.1, +0.3 log-odds on a decay of 64 [B,4,T,T]."""
    same, run = (z[:, :, None] == z[:, None, :]).double(), M.runs(z)[0]
    apart = (same * (run[:, :, None] != run[:, None, :])).tril()
    apart = apart + torch.eye(z.shape[1]) * (apart.sum(-1, keepdim=True) == 0)
    near = decay(z.shape[1], 64)
    heads = same, apart, near * (0.1 * same).exp(), near * (0.3 * same).exp()
    return torch.stack([normalise(w) for w in heads], 1)

def streamed(heads, z, *more, K=5, batch=4, **kw):
    """attention_sums over all rows of heads(z, *more) -> A, batch by batch."""
    total = None
    for b in range(0, len(z), batch):
        rows = [r[b:b + batch] for r in (z, *more)]
        total = M.add(total, M.attention_sums(heads(*rows), rows[0], K, **kw))
    return total

def sums_of(A, z, K=5, batch=16, **kw):
    return streamed(lambda z, A: A, z, A, K=K, batch=batch, **kw)

KINDS = [dict(), dict(repeats=True), dict(weights=(4, 2, 1, 1, .5))]

# ---------------------------------------------------------------------------------------------------------------------
# slow, independent versions

def slow_measures(A, z, K, gap):
    """Every measure of one head by loops. A [n,T,T], z [n,T] -> dict of floats."""
    A, z = A.double().numpy(), z.numpy()
    n, T = z.shape
    H = lambda p: -sum(x * math.log(x) for x in p if x > 0)
    ent, ew, ec, mw, mc, within, within_all, us, mass_other = [], [], [], [], [], [], [], [], []
    content = content_same = content_u = sink = own = 0.
    per = [[[] for _ in range(n)] for _ in range(K)]                                       # topic, row: list of w-u
    for b in range(n):
        for t in range(T):
            a, same = A[b, t, :t + 1], z[b, :t + 1] == z[b, t]
            w, o, u = a[same].sum(), a[~same].sum(), same.mean()
            ent.append(H(a)); mw.append(w); mc.append(o); within_all.append(w)
            ew.append(H(a[same] / w) if w > 0 else 0.); ec.append(H(a[~same] / o) if o > 0 else 0.)
            if not same.all():
                within.append(w); us.append(u); mass_other.append(o); per[z[b, t]][b].append(w - u)
            sink += a[0]; own += a[t]
            if t >= 2:
                content += a[1:t].sum()
                content_same += a[1:t][same[1:t]].sum()
                content_u += a[1:t].sum() * same[1:t].mean()
    q = n * T
    out = dict(entropy=np.mean(ent), entropy_ratio=np.mean(ent) / np.mean([math.log(t + 1) for t in range(T)]),
               entropy_within=np.dot(ew, mw) / sum(mw), entropy_cross=np.dot(ec, mc) / sum(mc), within=np.mean(within),
               within_all=np.mean(within_all), within_excess=np.mean(within) - np.mean(us),
               within_cross_ratio=sum(within) / sum(mass_other), sink=sink / q, self=own / q,
               within_content=content_same / content, within_content_uniform=content_u / content)
    # P
    s1 = s0 = uni = 0.
    for t in range(T):
        for s in range(1, t - gap + 1):
            same = z[:, t] == z[:, s]
            if same.any() and not same.all():
                pi = same.sum() * (~same).sum() / n
                s1 += pi * A[same, t, s].mean(); s0 += pi * A[~same, t, s].mean(); uni += pi / (t + 1)
    out['score_p'] = math.log((.99 * s1 + .01 * uni) / (.99 * s0 + .01 * uni))
    # O
    parts, cells, mean = [], [], A.mean(0)
    for b in range(n):
        edge = [0] + [t for t in range(1, T) if z[b, t] != z[b, t - 1]] + [T]
        parts.append([(edge[i], edge[i + 1], z[b, edge[i]]) for i in range(len(edge) - 1)])
    for b, runs in enumerate(parts):
        mates = [r for r in parts if len(r) == len(runs)]
        for i, (i0, i1, zi) in enumerate(runs):
            for j, (j0, j1, zj) in enumerate(runs[:max(i - 1, 0)]):
                p = np.mean([r[i][2] == r[j][2] for r in mates])
                if 0 < p < 1:
                    B = E = U = 0.
                    for t in range(i0, i1):
                        for s in range(max(j0, 1), j1):
                            if t - s >= gap:
                                B += A[b, t, s]; E += mean[t, s]; U += 1 / (t + 1)
                    cells.append((B, E, U, float(zi == zj), p))
    B, E, U, qq, p = np.array(cells).T
    F = E * (B @ E) / (E @ E)
    R = B - F
    same, other = max((F + R * qq / p).sum(), 0), max((F + R * (1 - qq) / (1 - p)).sum(), 0)
    out['score_o'] = math.log((.99 * same + .01 * U.sum()) / (.99 * other + .01 * U.sum()))
    out['T'] = (R * (qq - p)).sum()
    # specialisation: topic means as ratios over rows, errors by linearising those ratios
    means, errors = [], []
    for rows in per:
        rows = [r for r in rows if r]
        if len(rows) > 1:
            N = sum(map(len, rows)); m = sum(map(sum, rows)) / N
            means.append(m)
            errors.append(sum((sum(r) - m * len(r)) ** 2 for r in rows) / N ** 2 * len(rows) / (len(rows) - 1))
    out['specialisation'] = np.var(means, ddof=1) - np.mean(errors)
    return out

@pytest.mark.parametrize('kind', KINDS)
def test_every_measure_equals_the_slow_version(kind):
    kind = {'weights': (3, 2, 1)} if 'weights' in kind else kind
    z = make_rows(24, T=40, K=3, min_run=5, seed=3, **kind)
    g = torch.Generator().manual_seed(0)
    same = (z[:, :, None] == z[:, None, :])[:, None]
    A = normalise(torch.exp(2 * torch.randn(24, 2, 40, 40, generator=g) + same * torch.tensor([0., 1.]).view(2, 1, 1)))
    sums = sums_of(A, z, 3, batch=7, min_distance=4)
    fast, (T, sd, draws) = M.head_measures(sums, draws=50), M.o_null(sums, draws=50)
    for h in range(2):
        slow = slow_measures(A[:, h], z, 3, 4)
        assert T[h] == pytest.approx(slow.pop('T'), rel=1e-9)
        assert set(slow) | {'o_z', 'o_p'} == set(fast)
        for name, value in slow.items():
            assert fast[name][h] == pytest.approx(value, rel=1e-8, abs=1e-12), name

# ---------------------------------------------------------------------------------------------------------------------
# P and O: what they find and what they leave alone

def zeros_on_position(z):
    names, pattern = position_heads(z.shape[1])
    out = M.head_measures(streamed(lambda z: on_rows(pattern, len(z)), z), draws=100)
    for name, p, o, oz, op in zip(names, *(out[k] for k in ('score_p', 'score_o', 'o_z', 'o_p'))):
        assert abs(p) < 1e-12 and abs(o) < 1e-12 and oz == 0 and op == 1, (name, p, o, oz)

@pytest.mark.parametrize('case', CASES)
def test_position_alone_scores_zero(case):
    zeros_on_position(synth_rows(case, T=128, seed=1)[0])

def test_position_alone_scores_zero_with_unequal_topics():
    zeros_on_position(make_rows(40, T=256, min_run=32, seed=1, weights=(4, 2, 1, 1, .5)))

@pytest.mark.parametrize('case', CASES)
def test_topic_blind_heads_leave_o_alone(case):
    """Boundaries move P, not O. A random taste for tokens moves neither; for equal tokens, if tokens tell the topic."""
    z, segment, x = synth_rows(case, seed=2)
    g = torch.Generator().manual_seed(2)
    affinity = torch.stack((torch.randn(515, 515, generator=g), 4 * torch.eye(515)))    # a random table; equal tokens
    heads = lambda z, segment, x: torch.cat((segment_heads(segment), token_heads(x, affinity)), 1)
    out = M.head_measures(streamed(heads, z, segment, x))
    P, O, oz = (out[k] for k in ('score_p', 'score_o', 'o_z'))
    assert P[0] > 4 and 0.2 < P[1] < 0.6 and P[2] < -0.4 and abs(P[3]) < 0.01        # own, leaking, before; tokens
    assert (np.abs(oz[:4]) < 3).all() and (np.abs(O[:4]) < 0.04).all()
    assert oz[0] == 0 and oz[2] == 0                             # they reach no segment but one
    if 'group' in case:                                          # all its topics use all tokens alike
        assert abs(oz[4]) < 3 and abs(P[4]) < 0.01 and abs(O[4]) < 0.01
    else:
        assert oz[4] > 4 and P[4] > 0.02 and O[4] > 0.02

@pytest.mark.parametrize('case', CASES + ['unequal topics'])
def test_topical_heads_are_found(case):
    weights = (4, 2, 1, 1, .5)
    z = synth_rows(case, seed=4)[0] if case in CASES else make_rows(400, T=256, min_run=32, seed=4, weights=weights)
    out = M.head_measures(streamed(topic_heads, z))
    P, O = out['score_p'], out['score_o']
    assert (out['o_z'] > 4).all() and (out['o_p'] < 0.005).all()
    assert P[0] > 4 and O[0] > 4 and P[1] > 2 and O[1] > 4                              # nothing goes to other topics
    assert 0.03 < P[2] < 0.1 and 0.05 < O[2] < 0.12 and 0.1 < P[3] < 0.3 and 0.15 < O[3] < 0.35

def test_anti_topical_head_is_negative():
    z = make_rows(300, seed=5)
    other = normalise(1 - 0.5 * (z[:, :, None] == z[:, None, :]).double())[:, None]
    out = M.head_measures(sums_of(other, z))
    assert out['o_z'][0] < -4 and out['score_o'][0] < -0.3 and out['score_p'][0] < -0.3

@pytest.mark.parametrize('case', CASES)
def test_null_is_calibrated(case):
    """300 draws of 60 rows, segment and token heads: p uniform for each, and the max-statistic keeps its level."""
    rows = synth_rows(case, n=300 * 60, T=48, seed=7)
    affinity = 1.5 * torch.randn(2, 515, 515, generator=torch.Generator().manual_seed(7))
    heads = lambda segment, x: torch.cat((segment_heads(segment)[:, 1:], token_heads(x, affinity)), 1)
    p_values, z_values, any_head = [], [], 0
    for draw in range(300):
        z, segment, x = (r[60 * draw:60 * draw + 60] for r in rows)
        T, sd, draws = M.o_null(M.attention_sums(heads(segment, x), z, 5, min_distance=4), draws=199, seed=draw)
        (score, p), adjusted = M.null_z_p(T, sd, draws), M.max_statistic(T, sd, draws)
        assert (adjusted >= p - 1e-12).all() and p[1] == 1       # the segment before reaches no other: sd = 0
        p_values.append(p[[0, 2, 3]])
        z_values.append(score[[0, 2, 3]])
        any_head += adjusted.min() <= 0.1
    for p in np.stack(p_values, 1):
        assert stats.kstest(p, 'uniform').pvalue > 0.01 / 3      # three heads
    assert (abs(np.mean(z_values, 0)) < 0.2).all() and (abs(np.std(z_values, 0) - 1) < 0.2).all()
    assert stats.binomtest(any_head, 300, 0.1).pvalue > 0.01

def test_null_draws_are_shared():
    """The same draws for a head wherever it stands, others for another seed."""
    z, segment, x = synth_rows('group', n=60, T=64, seed=8)
    A = token_heads(x, torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)))
    draws = lambda A, seed: M.o_null(sums_of(A, z, min_distance=4), 199, seed)[2]
    assert np.allclose(draws(A, 1)[:, 1], draws(A[:, 1:], 1)[:, 0]) and not np.allclose(draws(A, 1), draws(A, 2))

def test_null_draw_by_hand():
    """Three rows, one pair each: T* takes the values of R . q[perm], and equal values are ties."""
    z = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4, [0] * 4 + [1] * 4 + [2] * 4, [2] * 4 + [0] * 4 + [1] * 4])
    g = torch.Generator().manual_seed(0)
    sums = sums_of(normalise(torch.rand(3, 1, 12, 12, generator=g)), z, 3, min_distance=2)
    R = M.other_blocks(sums)[0]['R'][:, 0, 0].numpy()
    T, sd, draws = M.o_null(sums, draws=600)
    assert T[0] == pytest.approx(R[0] - R.sum() / 3)
    for value in R - R.sum() / 3:
        assert 150 < np.isclose(draws[:, 0], value).sum() < 250
    tail = (np.abs(draws[:, 0]) > abs(T[0]) - 1e-9).mean()
    assert M.null_z_p(T, sd, draws)[1][0] == pytest.approx((1 + 600 * tail) / 601)

def test_p_and_max_statistic():
    z, p = M.null_z_p(np.array([3., 9]), np.array([1.5, 0]), np.array([[-3 * (1 - 1e-13), 0], [2.9, 0], [4, 0]]))
    assert z.tolist() == [2, 0] and p.tolist() == [3 / 4, 1]     # a tie but for rounding counts
    draws = np.array([[1., -2], [3, 0], [-.5, 1], [0, 4]])
    p = M.max_statistic(np.array([2.5, 0.]), np.array([1., 1]), draws)
    assert p.tolist() == [3 / 5, 1.]                             # max |T*|: 2, 3, 1, 4
    assert M.max_statistic(np.array([2.5, 9.]), np.array([1., 0]), draws).tolist() == [2 / 5, 1.]

# ---------------------------------------------------------------------------------------------------------------------
# the descriptive measures

def test_values_on_simple_heads():
    z = make_rows(60, seed=6)
    n, T = z.shape
    names, pattern = position_heads(T)
    out = M.head_measures(sums_of(on_rows(pattern, n), z), draws=10)
    at = {name: {k: v[i] for k, v in out.items()} for i, name in enumerate(names)}
    uniform, log = M.uniform_measures(z), np.log(np.arange(1, T + 1))
    for key in ('entropy', 'within', 'within_all'):
        assert at['uniform'][key] == pytest.approx(uniform[key], abs=1e-6)
    assert at['uniform']['entropy_ratio'] == pytest.approx(1) and uniform['entropy'] == pytest.approx(log.mean())
    assert at['uniform']['within_excess'] == pytest.approx(0, abs=1e-7)
    assert at['uniform']['within_content'] == pytest.approx(at['uniform']['within_content_uniform'], abs=1e-6)
    assert at['uniform']['specialisation'] == pytest.approx(0, abs=1e-9)
    first_run = (M.runs(z)[0] == 0).sum().item()
    assert first_run < (z == z[:, :1]).sum() and uniform['within'] < uniform['within_all'] < 1
    # the sink sees the first topic, itself all of its own, the previous token all but the boundaries
    assert at['sink']['sink'] == 1 and at['sink']['within_all'] == pytest.approx((z == z[:, :1]).double().mean())
    assert at['self']['self'] == 1 and at['self']['sink'] == pytest.approx(1 / T) and at['self']['within'] == 1
    assert np.isnan(at['sink']['within_content']) and np.isnan(at['self']['within_content'])
    assert np.isnan(at['self']['within_cross_ratio']) and np.isnan(at['self']['entropy_cross'])
    few = lambda x: normalise(((1 - x) * (torch.arange(T) == 0) + x / T).expand(T, T))      # little mass but on s = 0
    faint = torch.stack([few(.01), few(.04)])
    assert np.isnan(M.head_measures(sums_of(on_rows(faint, n), z), draws=1)['within_content']).tolist() == [True, False]
    changes = (M.runs(z)[1] - 1).sum().item()
    assert at['previous']['within_all'] == pytest.approx(1 - changes / (n * T)) and at['previous']['entropy'] == 0
    assert at['window8']['entropy'] == pytest.approx(np.log(np.minimum(np.arange(1, T + 1), 8)).mean(), abs=1e-6)

    topical = M.head_measures(sums_of(topic_heads(z), z), draws=10)
    assert topical['within'][0] == pytest.approx(1, abs=1e-6)
    assert topical['entropy_within'][0] == pytest.approx(topical['entropy'][0])
    assert topical['within_excess'][0] == pytest.approx(1 - uniform['within'], abs=1e-6)
    assert np.isnan(topical['within_cross_ratio'][0]) and np.isnan(topical['entropy_cross'][0])
    assert (topical['within_excess'] > 0).all() and topical['within_content'][1] > topical['within_content_uniform'][1]

def test_unmasked():
    z = make_rows(20, seed=7)
    n, T = z.shape
    full = M.unmasked_measures(torch.full((n, 2, T, T), 1 / T), z)
    chance = M.uniform_measures(z, causal=False)
    assert full['entropy'].shape == (n, 2) and full['entropy'].mean().item() == pytest.approx(math.log(T), rel=1e-5)
    assert full['within_all'].mean().item() == pytest.approx(chance['within_all'], rel=1e-5)
    assert chance['within_all'] == pytest.approx(np.mean([(r[:, None] == r).mean() for r in z.numpy()]))
    A = on_rows(position_heads(T)[1], n)
    causal, out = M.unmasked_measures(A, z), M.head_measures(sums_of(A, z), draws=1)
    for key in causal:
        assert np.allclose(causal[key].mean(0), out[key], atol=1e-5)

def test_streaming_and_halves():
    z = torch.cat((make_rows(20, seed=8, segments=(2, 3)), make_rows(25, seed=9, segments=(2, 5))))     # R 3, then 5
    A = torch.cat((topic_heads(z), segment_heads(M.runs(z)[0])), 1)
    once, streamed = M.attention_sums(A, z, 5), sums_of(A, z, batch=9)
    for key in once:
        assert torch.allclose(once[key].double(), streamed[key].double(), atol=1e-9), key
    halves = M.add(M.attention_sums(A[:20], z[:20], 5), M.attention_sums(A[20:], z[20:], 5))
    for key, value in M.head_measures(once, draws=50).items():
        assert np.allclose(value, M.head_measures(halves, draws=50)[key], equal_nan=True), key
    first = M.attention_sums(A[:20], z[:20], 5)
    assert np.allclose(M.score_p(first), M.head_measures(sums_of(A[:20], z[:20]), 5)['score_p'])

def test_inputs_are_left_alone():
    z = make_rows(5, seed=10)
    A = topic_heads(z).double()
    before, part = A.clone(), M.attention_sums(A, z, 5)
    kept = {k: v.clone() for k, v in part.items()}
    M.head_measures(M.add(part, part), draws=5)
    assert torch.equal(A, before) and all(torch.equal(kept[k], part[k]) for k in kept)

def test_no_choice_gives_nan_not_errors():
    z = torch.zeros(4, 32, dtype=torch.long)
    out = M.head_measures(sums_of(on_rows(position_heads(32)[1], 4), z), draws=10)
    for key in ('within', 'within_cross_ratio', 'score_p', 'score_o', 'specialisation', 'entropy_cross'):
        assert np.isnan(out[key]).all(), key
    assert (out['o_p'] == 1).all() and (out['o_z'] == 0).all() and (out['within_all'] > 1 - 1e-6).all()

def test_specialisation_has_rows_as_its_unit():
    """A head whose taste for a topic changes from row to row is no specialist; one for topic 2 is."""
    spec, raw = [], []
    for seed in range(40):
        z = make_rows(30, T=64, K=4, min_run=8, seed=seed)
        same = (z[:, :, None] == z[:, None, :]).double()
        taste = 2 * torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).gather(1, z)[:, :, None]
        sums = sums_of(torch.stack((normalise(torch.exp(taste * same)),
                                    normalise(torch.exp(2. * same * (z == 2)[:, :, None]))), 1), z, 4)
        spec.append(M.specialisation(sums))
        raw.append((sums['topic_excess'].sum(0) / sums['topic_mixed'].sum(0)).var(1).numpy())
    spec, raw = np.array(spec), np.array(raw)
    assert abs(spec[:, 0].mean()) < 0.2 * raw[:, 0].mean()       # what varies by row is noise
    assert (spec[:, 1] > 0.8 * raw[:, 1]).all()

# ---------------------------------------------------------------------------------------------------------------------
# content-free fit

def test_free_patterns():
    T = 200
    X = M.free_patterns(T)
    assert X.shape == (15, T, T) and X.dtype == torch.float64 and torch.equal(X, X.tril())
    assert torch.allclose(X.sum(-1), torch.ones(15, T).double())
    t, row = 150, X[:, 150]
    assert np.allclose(row[0, :t + 1], 1 / (t + 1)) and row[1, 0] == row[2, t] == row[3, t - 1] == X[3, 0, 0] == 1
    assert row[4, t].item() / row[4, t - 9].item() == pytest.approx(10)
    for i, w in enumerate((8, 32, 128)):
        assert (row[5 + i] > 0).sum() == w and row[5 + i, t - w + 1].item() == pytest.approx(1 / w)
    for i, length in enumerate((2, 4, 8, 16, 32, 64, 128)):
        assert row[8 + i, t - 5].item() / row[8 + i, t].item() == pytest.approx(math.exp(-5 / length))

@pytest.mark.parametrize('T', [24, 160])                         # where T is short, patterns coincide
def test_free_fit_finds_what_is_in_the_span(T):
    X = M.free_patterns(T)
    mixed = torch.stack([.3 * X[1] + .5 * X[11] + .2 * X[5], .6 * X[3] + .4 * X[0], .1 * X[9] + .9 * X[4]])
    fit = M.free_fit(torch.cat((X, mixed)))
    assert torch.allclose(fit, torch.cat((X, mixed)), atol=1e-10)
    assert torch.allclose(M.overlap(fit[None], torch.cat((X, mixed))), torch.ones(1, 18).double())

def test_free_fit_is_nnls():
    """Out of the span: the weights of scipy on the whole design."""
    mean = normalise(torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)).double() ** 4)
    mean[2] = position_heads(24)[1][-1]
    X, fit = M.free_patterns(24), M.free_fit(mean)
    for h in range(3):
        w = nnls(X.flatten(1).T.numpy(), mean[h].flatten().numpy())[0]
        assert torch.allclose(fit[h], torch.einsum('k,kts->ts', torch.from_numpy(w / w.sum()), X), atol=1e-9)

def test_overlap():
    g = torch.Generator().manual_seed(0)
    A, pattern = normalise(torch.rand(2, 3, 9, 9, generator=g)), normalise(torch.rand(3, 9, 9, generator=g))
    slow = [[np.mean([sum(min(A[b, h, t, s], pattern[h, t, s]).item() for s in range(t + 1)) for t in range(9)])
             for h in range(3)] for b in range(2)]
    assert np.allclose(M.overlap(A, pattern), slow) and np.allclose(M.overlap(A[:1], A[0]), 1)
    X = M.free_patterns(9)
    assert M.overlap(X[None, 2:3], X[1:2]).item() == pytest.approx(1 / 9)               # self and first meet at t=0

def test_content_is_what_the_fit_leaves_over():
    """Fitted on one half of the rows: it covers the position heads of its span, not others, and no topical head."""
    z = make_rows(80, seed=12)
    names, pattern = position_heads(128)
    A = torch.cat((on_rows(pattern, 80), topic_heads(z)), 1)
    mean = sums_of(A[:40], z[:40])['S'] / 40
    fit, ceiling = (M.overlap(A[40:], p).mean(0) for p in (M.free_fit(mean), mean))
    at = dict(zip([*names, 'all', 'apart', '+.1', '+.3'], zip(fit.tolist(), ceiling.tolist())))
    for name in names:
        assert at[name][1] == pytest.approx(1)
    for name in ('uniform', 'sink', 'previous', 'window32', 'decay128', 'harmonic'):
        assert at[name][0] == pytest.approx(1)
    assert at['fixed'][0] < 0.5 and at['wave'][0] < 0.95                                # positions, but none of ours
    assert at['all'][0] < at['all'][1] < 0.7 and at['apart'][0] + 0.01 < at['apart'][1] < 0.85
    assert 0.995 > at['+.1'][0] > at['+.3'][0] > 0.9

# ---------------------------------------------------------------------------------------------------------------------
# which heads to ablate

def test_ablation_heads():
    score = np.array([[.1, .9, np.nan], [.5, -.2, .8], [0, .3, .2]])
    entropy = np.array([[1.0, 2.0, 2.1], [3.0, 2.3, 2.05], [3.2, 0.1, 4.0]])
    out = M.ablation_heads(score, entropy, 3, torch.Generator().manual_seed(0))
    assert out['top'] == [(0, 1), (1, 2), (1, 0)]
    assert out['matched'] == [(0, 2), (1, 1), (2, 0)]            # 2.0: 2.1; 2.05: 2.3, for 2.1 is taken; 3.0: 3.2
    seen = set()
    for seed in range(60):
        draw = M.ablation_heads(score, entropy, 3, torch.Generator().manual_seed(seed))['random']
        assert len(set(draw)) == 3 and not set(draw) & set(out['top'])
        seen |= set(draw)
    assert len(seen) == 6                                        # each of the others is drawn at some time
    again = [M.ablation_heads(score, entropy, 3, torch.Generator().manual_seed(5))['random'] for _ in range(2)]
    assert again[0] == again[1]
    most = M.ablation_heads(score, entropy, 7, torch.Generator().manual_seed(0))        # 2 others are left
    assert len(most['top']) == 7 and set(most['random']) == set(most['matched']) == {(1, 1), (0, 2)}
    assert most['top'][-1] == (2, 0) and most['matched'] == [(0, 2), (1, 1)]
    every = M.ablation_heads(score, entropy, 9, torch.Generator())
    assert every['top'][-1] == (0, 2) and every['random'] == every['matched'] == []    # nan is the lowest

# ---------------------------------------------------------------------------------------------------------------------
# runs and distances

def test_runs_and_distances():
    z = torch.tensor([[3, 3, 1, 1, 1, 3], [0, 0, 0, 0, 0, 0]])
    run, count = M.runs(z)
    assert run.tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6] and count.tolist() == [3, 1]
    assert [x.tolist() for x in M.run_edges(z)] == [[[0, 2, 5], [0, 6, 6]], [[2, 5, 6], [6, 6, 6]]]
    assert M.distance_from_boundary(z).tolist() == [[-1, -1, 0, 1, 2, 0], [-1] * 6]
    assert M.same_keys(z).tolist() == [[1, 2, 1, 2, 3, 3], [1, 2, 3, 4, 5, 6]]

def test_by_distance():
    distance = np.array([-1, 0, 1, 2, 3, 4, 7, 8, 127, 128, 500, -1])
    correct = np.array([0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0])
    out = M.by_distance(correct, distance)
    assert out['distance'] == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert out['count'] == [1, 1, 2, 2, 1, 0, 0, 1, 2]
    assert out['accuracy'] == [1, 0, .5, 1, 0, None, None, 1, .5]

# ---------------------------------------------------------------------------------------------------------------------
# probes

@pytest.mark.parametrize('n_rows, max_tokens', [(11, 60), (4, 10 ** 6)])
def test_probe_tokens_share_no_row(n_rows, max_tokens):
    train, test = M.probe_tokens(n_rows, 16, max_tokens, torch.Generator().manual_seed(0))
    rows = [set((x // 16).tolist()) for x in (train, test)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] <= set(range(n_rows))
    sizes = [min(max_tokens // 2, 16 * k) for k in (n_rows // 2, n_rows - n_rows // 2)]
    assert [len(x) for x in (train, test)] == sizes
    assert len(set(train.tolist())) == len(train) and len(set(test.tolist())) == len(test)
    again = M.probe_tokens(n_rows, 16, max_tokens, torch.Generator().manual_seed(0))
    assert torch.equal(train, again[0]) and torch.equal(test, again[1])

def gaussians(n, d, K, signal=1.0, seed=0):
    """x [n,d] around K means, on very different scales, a column constant; y [n]."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    scale = np.logspace(-3, 3, d)                                # standardising must undo this
    x = ((signal * rng.normal(size=(K, d))[y] + 3 * rng.normal(size=(n, d))) * scale + 10 * scale).astype(np.float32)
    x[:, 7] = 0.1
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(scale)

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('n, d, K', [(2000, 64, 5), (1000, 200, 3), (600, 100, 8)])
def test_probe_is_scikit_learns(n, d, K):
    """The same guesses as LogisticRegression but for the few on a border, more than a wrong penalty would leave."""
    x, y, _ = gaussians(n, d, K, signal=0.3)
    half = n // 2
    scale = StandardScaler().fit(x[:half])
    def reference(C):
        model = LogisticRegression(C=C, tol=1e-4, max_iter=5000).fit(scale.transform(x[:half]), y[:half])
        return model.predict(scale.transform(x[half:]))
    same = lambda C: (M.probe(x[:half], y[:half], x[half:]).numpy() == reference(C)).mean()
    assert same(1.0) > 0.99 and same(1.0) > same(0.01) + 0.005
    labels = y * 2 + 1                                           # topics need not be 0..K-1
    assert torch.equal(M.probe(x[:half], labels[:half], x[half:]), M.probe(x[:half], y[:half], x[half:]) * 2 + 1)

def test_probe_learns_what_is_there():
    x, y, scale = gaussians(6000, 64, 5)
    def accuracy(y):
        return (M.probe(x[:3000], y[:3000], x[3000:]) == y[3000:]).float().mean()
    unit = x / scale                                             # nearest class mean: the best possible rule here
    means = torch.stack([unit[:3000][y[:3000] == k].mean(0) for k in range(5)])
    best = (((unit[3000:, None] - means) ** 2).sum(-1).argmin(1) == y[3000:]).float().mean()
    assert accuracy(y) > best - 0.03 and best > 0.8
    assert abs(accuracy(y[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]) - 0.2) < 0.04
    assert (M.probe(x[:50], torch.full((50,), 3), x[50:60]) == 3).all()

def test_references():
    x, y = np.array([0, 0, 0, 1, 1, 2, 3]), np.array([1, 1, 0, 2, 2, 0, 1])
    assert M.majority(y, np.array([1, 1, 0, 2])) == 0.5
    # token 0 -> 1, 1 -> 2, 2 -> 0, 3 -> 1, 4 unseen -> 1; a tie falls back on the majority as well
    assert M.token_identity(x, y, np.array([0, 1, 2, 3, 4]), np.array([1, 2, 0, 1, 1]), 6) == 1
    assert M.token_identity(np.append(x, 2), np.append(y, 2), np.array([2, 2, 5, 0]), np.array([0, 1, 0, 0]), 6) == 0.25
    posterior = np.array([[.2, .5, .3], [.6, .3, .1], [.1, .1, .8]], np.float16)
    assert M.posterior_accuracy(posterior, np.array([1, 0, 0])) == pytest.approx(2 / 3)

def test_running_means():
    x = 5 + torch.randn(2, 150, 3, generator=torch.Generator().manual_seed(0))
    out = M.running_means(x)
    assert list(out) == ['all', '8', '32', '128'] and all(v.dtype == x.dtype for v in out.values())
    for name, w in (('all', 150), ('8', 8), ('32', 32), ('128', 128)):
        slow = torch.stack([x[:, max(t + 1 - w, 0):t + 1].mean(1) for t in range(150)], 1)
        assert torch.allclose(out[name], slow, atol=1e-5), name
    short = M.running_means(x[:, :5], windows=(2, 8))            # a window longer than the row is all of it
    assert torch.allclose(short['8'], out['all'][:, :5]) and torch.allclose(short['2'][:, 4], x[:, 3:5].mean(1))

def test_control_labels():
    state = torch.get_rng_state()
    labels = M.control_labels(5000, 5, seed=1)
    assert labels.shape == (5000,) and labels.dtype == torch.int64 and torch.equal(state, torch.get_rng_state())
    assert torch.equal(labels, M.control_labels(5000, 5, 1)) and not torch.equal(labels, M.control_labels(5000, 5, 2))
    assert stats.chisquare(labels.bincount()).pvalue > 0.01 and labels.max() == 4

def test_posterior_r2():
    x, _, scale = gaussians(4000, 64, 5)
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 5, generator=g).double() / scale[:, None]
    W[7] = 0
    y = x.double() @ W
    y = (y - y.mean(0)) / y.std(0) - 4                           # logs, most of them far from floor and 1
    r2 = lambda y, x=x, **kw: M.posterior_r2(x[:2000], y[:2000].exp(), x[2000:], y[2000:].exp(), **kw)
    assert r2(y, floor=1e-9) == pytest.approx(1, abs=1e-6)
    noise = torch.randn(4000, 5, generator=g).double()
    assert -0.1 < r2(noise - 4, floor=1e-9) < 0.01               # worse than the mean by about d/n
    half = r2(y + noise, floor=1e-9)
    assert half == pytest.approx(0.5, abs=0.05)
    # the same by scikit-learn; the train mean is the reference, and all outputs count by their variance
    shifted = torch.cat((y[:2000], y[2000:] + 0.5)) * torch.tensor([1., 1, 1, 1, 2]) + noise
    X = StandardScaler().fit(x[:2000].double()).transform(x.double())
    error = shifted[2000:] - torch.from_numpy(LinearRegression().fit(X[:2000], shifted[:2000]).predict(X[2000:]))
    total = shifted[2000:] - shifted[:2000].mean(0)
    assert r2(shifted, floor=1e-9) == pytest.approx(1 - (error ** 2).sum().item() / (total ** 2).sum().item(), abs=1e-4)
    zero = torch.where(noise < 0, -torch.inf, -1.)               # p = 0 counts as p = floor
    assert r2(zero) == pytest.approx(r2(zero.clamp(min=math.log(1e-4)), floor=1e-9)) and math.isfinite(r2(zero))
    assert r2(zero, floor=1e-3) == pytest.approx(r2(zero))       # two values: the scale does not matter
    assert r2(y, x=x[:, :3]) < 0.5
    assert math.isfinite(M.posterior_r2(x[:20], y[:20].exp(), x[2000:], y[2000:].exp()))        # n < d

# ---------------------------------------------------------------------------------------------------------------------
# circuits

def rope(x, position, theta):
    """Half-rotation RoPE on a vector, entry by entry."""
    d, out = len(x), x.clone()
    for i in range(d // 2):
        a = position * theta ** (-2 * i / d)
        out[i] = x[i] * math.cos(a) - x[i + d // 2] * math.sin(a)
        out[i + d // 2] = x[i + d // 2] * math.cos(a) + x[i] * math.sin(a)
    return out

@pytest.mark.parametrize('H, K, d, n', [(4, 4, 8, 32), (6, 2, 8, 40), (4, 2, 16, 12)])
def test_spectra_equal_dense_svd(H, K, d, n):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    W_Q, W_K, W_V, W_O = randn(H * d, n), randn(K * d, n), randn(K * d, n), randn(n, H * d)
    g1, gq, gk = randn(n).exp(), randn(d).exp(), randn(d).exp()
    top = min(d, n)
    for distance in (0, 1, 16):
        s = M.qk_svd(W_Q, W_K, g1, gq, gk, distance, theta=100.)[1]
        assert s.shape == (H, top)
        for h in range(H):                                       # q at position 20, k at 20 - distance: q.k as a matrix
            k0 = h // (H // K) * d
            q = torch.stack([rope(c, 20, 100.) for c in (gq[:, None] * W_Q[h * d:(h + 1) * d] * g1).T], 1)
            k = torch.stack([rope(c, 20 - distance, 100.) for c in (gk[:, None] * W_K[k0:k0 + d] * g1).T], 1)
            assert torch.allclose(s[h], torch.linalg.svdvals(q.T @ k)[:top], rtol=1e-9)
    s = M.ov_svd(W_O, W_V, g1, d)[1]
    for h in range(H):
        k0 = h // (H // K) * d
        dense = W_O[:, h * d:(h + 1) * d] @ W_V[k0:k0 + d] @ torch.diag(g1)
        assert torch.allclose(s[h], torch.linalg.svdvals(dense)[:top], rtol=1e-9)

def test_singular_vectors_and_alignment():
    """U S V' is the dense matrix of each head; vectors inside a basis align fully, others as chance has it."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    H, K, d, n = 6, 2, 8, 40
    W_Q, W_K, W_V, W_O = randn(H * d, n), randn(K * d, n), randn(K * d, n), randn(n, H * d)
    g1, gq, gk = randn(n), randn(d), randn(d)
    for h, (U, S, V) in enumerate(zip(*M.ov_svd(W_O, W_V, g1, d))):
        k0 = h // (H // K) * d
        assert torch.allclose(U * S @ V.mT, W_O[:, h * d:(h + 1) * d] @ W_V[k0:k0 + d] @ torch.diag(g1))
    for h, (U, S, V) in enumerate(zip(*M.qk_svd(W_Q, W_K, g1, gq, gk, 16, 100.))):         # queries by keys
        Q, K_ = (torch.diag(w) @ W[i * d:(i + 1) * d] @ torch.diag(g1)
                 for W, w, i in ((W_Q, gq, h), (W_K, gk, h // (H // K))))
        assert torch.allclose(U * S @ V.mT, Q.mT @ M.rotation(-16, d, 100.) @ K_)
        assert (S.diff() <= 0).all() and torch.allclose(V.mT @ V, torch.eye(d, dtype=V.dtype), atol=1e-12)
    vectors, turned = torch.linalg.qr(randn(200, 64, 8))[0], randn(3, 3)
    basis = torch.linalg.qr(vectors[5, :, :3] @ turned)[0]       # the first 3 directions of head 5, in another basis
    found = M.alignment(vectors, basis)
    assert found[5].item() == pytest.approx(1) and abs(found[torch.arange(200) != 5].mean().item() - 3 / 64) < 0.005
    assert M.alignment(vectors, torch.cat([basis, vectors[5, :, 3:4]], 1))[5].item() == pytest.approx(1)
    assert M.alignment(vectors, basis[:, :0]).isnan().all()

def test_probe_directions():
    """The K - 1 directions in which class means differ, whatever the scale of the activations; none for one class."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (6000,), generator=g)
    x = torch.randn(6000, 20, generator=g)                       # topics differ in entries 4 and 9 alone
    x[:, 4] += 3 * (y == 1)
    x[:, 9] += 3 * (y == 2)
    for scale in (torch.ones(20), torch.full((20,), 50.)):
        basis = M.probe_directions(M.fit_probe(x * scale, y))
        assert basis.shape == (20, 2) and torch.allclose(basis.mT @ basis, torch.eye(2, dtype=basis.dtype))
        assert basis[[4, 9]].square().sum() > 2 * 0.98
    wide = torch.ones(20)
    wide[4] = 100                                                # what is read of a wide entry is a small weight
    assert M.probe_directions(M.fit_probe(x * wide, y))[4].abs().max() < 0.5
    assert M.probe_directions(M.fit_probe(x, 0 * y)).shape == (20, 0)

def test_effective_rank():
    s = torch.tensor([[1., 0, 0, 0], [2, 2, 2, 2], [1, 1, 0, 0]])
    assert torch.allclose(M.effective_rank(s), torch.tensor([1., 4, 2]))
    p = torch.tensor([.8, .2])
    assert M.effective_rank(p.sqrt()).item() == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-6)
