"""Statistics and tables, from rows made by hand."""
import numpy as np
import pytest
from scipy import stats

import report
import runs
from report import contrasts, effects, matched, max_t, sign_flip_p, sign_flips, smallest_effect, t_interval, value

COMPARE = {'base': 'shuffled', 'placebo': 'pseudo', 'primary': ['score_p', 'topic_ordered', 'drope - kept']}
HEADER = {'experiment': 'made', 'compare': COMPARE, 'device': 'none', 'versions': {'torch': '2'}}

def row(order, positions, seed=0, steps=10, main=True, excess=0.1, probe=(0.2, 0.5, 0.9), **mean):
    """A row as analyze.py leaves it: order 'topic_c4' or 'pseudo_pure', and the numbers of the measures."""
    arm = runs.arm_settings(f'mha_{order}', 4)
    columns = {'attention': 'mha', 'positions': positions, 'seed': seed, 'main': main,
               'recal_steps': steps if positions in ('drope', 'kept') else None,
               **{key: arm[key] for key in ('order', 'cycles', 'cooldown', 'pure')}}
    names = {'condition': runs.condition(runs.arm_name(columns), positions), **columns}
    return names | {
        'measures_version': 1, 'val_loss': 5 + excess, 'excess': excess, 'gap_closed': None, 'orderedness': 0.1,
        'references': {'uniform': 6.0, 'bigram': 5.5, 'filter': 5.0, 'oracle': None},
        'mean': {'score_p': 0.0, 'score_o': None, 'within': 0.5, 'entropy': 1.0} | mean, 'uniform': {'within': 0.3},
        'probe': {'accuracy': list(probe), 'references': {'majority': 0.2, 'untrained': [0.1, 0.15]}}, 'config': {}}

# -----------------------------------------------------------------------------
# tests and intervals

def test_interval_and_sign_flips():
    x = np.random.default_rng(0).normal(0.5, 1, 6)
    mean, low, high = t_interval(x)
    reference = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high)) and mean == pytest.approx(x.mean())
    reference = stats.permutation_test((x,), np.mean, permutation_type='samples', n_resamples=np.inf)
    assert sign_flip_p(x) == pytest.approx(reference.pvalue)
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64 and sign_flip_p([1]) is None
    assert t_interval([2.0]) == (2, None, None)

def test_many_seeds_are_sampled():
    """Beyond 2^16 patterns the flips are drawn: an effect and none are told apart as by the t-test."""
    assert len(sign_flips(20)) == 2 ** 16 and (sign_flips(20)[0] == 1).all() and len(sign_flips(3)) == 8
    x = np.random.default_rng(1).normal(0.45, 1, 20)
    assert sign_flip_p(x) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.01)

def test_smallest_effect():
    # six seeds must all agree in sign: Phi(d)^6 = 0.8, so d = 1.79
    assert smallest_effect(6) == pytest.approx(1.79, abs=0.06)
    assert smallest_effect(8) < 1.35 and smallest_effect(5) is None

def test_max_t():
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1, (6, 1))
    assert max_t(d)[0] == pytest.approx(sign_flip_p(d[:, 0]))              # one measure: nothing to adjust
    d = rng.normal(0, 1, (6, 5)) + np.array([3, 0, 0, 0, 0])
    p = max_t(d)
    assert all(a >= sign_flip_p(column) - 1e-12 for a, column in zip(p, d.T)) and p[0] == min(p)
    assert max_t(np.repeat(d[:, :1], 5, axis=1)) == pytest.approx([sign_flip_p(d[:, 0])] * 5)   # copies cost nothing
    rejected = [min(max_t(rng.normal(0, 1, (6, 6)))) <= 0.05 for _ in range(1000)]
    assert np.mean(rejected) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5      # the family keeps its level
    alike = lambda: 0.9 * rng.normal(0, 1, (6, 1)) + 0.44 * rng.normal(0, 1, (6, 6))
    rejected = [min(max_t(alike())) <= 0.05 for _ in range(1000)]          # and where its measures go together
    assert np.mean(rejected) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5
    shift = np.array([2.5, 2.5, 0, 0, 0, 0])                               # two of six measures, at 2.5 SD
    both = [max(max_t(rng.normal(0, 1, (6, 6)) + shift)[:2]) <= 0.05 for _ in range(300)]
    assert np.mean(both) > 0.5                                             # found most of the time

# -----------------------------------------------------------------------------
# what is compared

def test_values_of_a_row(monkeypatch):
    r = row('topic_c4', 'drope', score_p=0.3)
    assert (value(r, 'score_p'), value(r, 'val_loss'), value(r, 'probe'), value(r, 'score_o')) == (0.3, 5.1, 0.5, None)
    assert value(r, 'probe.accuracy') == 0.9 and value(r, 'probe.references.untrained') == 0.15
    assert value(r, 'probe.references.ceiling') is None
    assert [report.chance(r, key) for key in ('within', 'probe', 'score_p', 'val_loss')] == [0.3, 0.2, 0.0, None]
    monkeypatch.setitem(report.MEASURES, 'score_p', report.MEASURES['score_p']._replace(since=2))
    assert value(r, 'score_p') is None                                     # this row's P was defined otherwise
    assert '| — |' in report.summary(HEADER, [r])

def test_base_and_placebo():
    orders = ('shuffled', 'topic_c4', 'pseudo_c4', 'topic_ordered_pure', 'shuffled_pure')
    rows = [row(order, 'rope') for order in orders]
    assert {tuple(c['arms']) for c in contrasts(rows, COMPARE)} == {
        ('mha_topic_c4', 'mha_shuffled'), ('mha_topic_c4', 'mha_pseudo_c4'), ('mha_pseudo_c4', 'mha_shuffled'),
        ('mha_topic_ordered_pure', 'mha_shuffled_pure'), ('mha_shuffled_pure', 'mha_shuffled')}
    assert contrasts(rows[:2], COMPARE | {'base': 'topic'}) == []
    assert [c['named'] for c in contrasts([rows[0], row('topic_ordered', 'rope')], COMPARE)] == [True]

def test_effects_are_paired_by_seed():
    rows = []
    for seed in (0, 1):
        rows += [row('shuffled', 'drope', seed, score_p=10 * seed), row('shuffled', 'kept', seed, score_p=5 * seed),
                 row('topic_ordered', 'drope', seed, score_p=10 * seed + 2 + seed),
                 row('topic_ordered', 'kept', seed, score_p=5 * seed + 1),
                 row('topic_ordered', 'drope', seed, steps=99, main=False, score_p=77)]
    found = {(e['measure'], e['where']): e for e in effects(HEADER, rows)}
    primary = found['score_p', 'drope - kept']
    assert primary['differences'] == {0: 1, 1: 2} and primary['kind'] == 'primary' and primary['n'] == 2
    assert primary['p'] == 0.5 and primary['p_adjusted'] is None
    tested = {key for key, e in found.items() if e['kind'] == 'tested'}     # there are no RoPE rows
    assert tested == {(m, 'drope') for m in ('score_p', 'val_loss', 'within', 'entropy', 'probe')}
    assert found['score_p', 'drope']['differences'] == {0: 2, 1: 3}
    assert found['score_p', 'drope']['p_adjusted'] is not None
    assert found['score_p', 'kept']['p_adjusted'] is None and not any(m == 'score_o' for m, _ in found)
    one = effects(HEADER, [r for r in rows if r['seed'] == 0])
    assert all((e['low'], e['p'], e['p_adjusted']) == (None, None, None) for e in one)

def test_adjusted_over_common_seeds():
    rows = [row(order, 'drope', seed, score_p=v + seed, within=None if (order, seed) == ('topic_ordered', 3) else v)
            for seed in range(4) for order, v in (('shuffled', 0.0), ('topic_ordered', 1.0))]
    assert all(e['p_adjusted'] is not None for e in effects(HEADER, rows))

def curve(order, seed, losses, probe):
    """Rows of an arm along its recalibration lengths: the middle probe is a function of the loss above the filter."""
    return [row(order, 'drope', seed, i + 1, main=i == 0, excess=x, probe=(0, probe(x), 0))
            for i, x in enumerate(losses)]

def test_equal_loss():
    """Arms that differ in loss alone do not differ at equal loss; a shift of the measure is found; no extrapolation."""
    line = lambda x: 0.9 - 0.5 * x
    rows = []
    for seed in range(3):
        shifted = lambda x, shift=0.1 + 0.01 * seed: line(x) + shift
        rows += [*curve('shuffled', seed, (0.5, 0.3, 0.1), line), *curve('topic_ordered', seed, (0.4, 0.2, 0.05), line),
                 *curve('pseudo', seed, (0.4, 0.2), shifted),
                 *curve('topic_c4', seed, (0.9, 0.8), line)]               # never as good as the others
    found = {(*m['arms'], m['measure']): m for m in matched(HEADER, rows)}
    same, shifted = found['mha_topic_ordered', 'mha_shuffled', 'probe'], found['mha_pseudo', 'mha_shuffled', 'probe']
    assert same['mean'] == pytest.approx(0, abs=1e-9) and same['n'] == 3
    assert shifted['mean'] == pytest.approx(0.11) and shifted['low'] > 0.08 and shifted['p'] == 0.25
    assert found['mha_topic_ordered', 'mha_pseudo', 'probe']['mean'] == pytest.approx(-0.11)
    never = [m for arms, m in found.items() if 'mha_topic_c4' in arms]
    assert never and all(m['n'] == 0 and m['mean'] is None for m in never)

def test_report_with_one_seed_and_with_several():
    rows = [row(order, positions, seed) for seed in (0, 1) for order in ('shuffled', 'topic_ordered')
            for positions in ('rope', 'drope', 'kept')]
    text = report.summary(HEADER, rows, ['loss.png'])
    assert '| mha_topic_ordered_drope | 5.1000 ± 0.0000 |' in text and '(uniform 30.0%)' in text and '± 0.000' in text
    assert 'figures/loss.png' in text and 'The smallest p that 2 seeds can give is 0.5.' in text
    assert '## Realised order' in text
    one = report.summary(HEADER, rows[:6])
    assert 'One seed: no interval.' in one and 'nan' not in one and 'none | — | 1 | — | — |' in one
