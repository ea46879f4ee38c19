"""Statistics, tables and figures, from rows made by hand."""
import base64
import itertools
import zlib

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

import plot
import report
import runs
from report import compared, contrasts, course, effects, exchange_p, matched, max_t, patterns, value
from test_train import run, succeeds

COMPARE = {'base': 'shuffled', 'placebo': 'pseudo', 'primary': ['score_p', 'topic_ordered', 'drope']}
HEADER = {'experiment': 'made', 'compare': COMPARE, 'device': 'none', 'versions': {'torch': '2'}}
TOPIC = {'arms': ['mha_topic_ordered', 'mha_shuffled', 'mha_reshuffled'], 'label': 'topic_ordered - base'}
SWAPPED = TOPIC | {'arms': ['mha_topic_ordered', 'mha_reshuffled', 'mha_shuffled']}
THREE = ('topic_ordered', 'shuffled', 'reshuffled')

def row(order, positions, seed=0, steps=10, main=True, excess=0.1, probe=(0.2, 0.5, 0.9), **mean):
    """A row as analyze.py leaves it: order 'topic_c4' or 'pseudo_pure', and the numbers of the measures."""
    arm = runs.arm_settings(f'mha_{order}', 4)
    columns = {'attention': 'mha', 'positions': positions, 'seed': seed, 'main': main,
               'recal_steps': steps if positions in ('drope', 'kept') else None,
               **{key: arm[key] for key in ('order', 'cycles', 'cooldown', 'pure', 'repeat')}}
    names = {'condition': runs.condition(runs.arm_name(columns), positions), **columns}
    return names | {
        'measures_version': 2, 'val_loss': 5 + excess, 'excess': excess, 'gap_closed': None, 'orderedness': 0.1,
        'references': {'uniform': 6.0, 'bigram': 5.5, 'filter': 5.0, 'oracle': None},
        'mean': {'score_p': 0.0, 'score_o': None, 'within': 0.5, 'entropy': 1.0} | mean, 'uniform': {'within': 0.3},
        'probe': {'accuracy': list(probe), 'references': {'majority': 0.2, 'untrained': [0.1, 0.15]}}, 'config': {}}

def sign_flip_p(d):
    return exchange_p([[x, -x] for x in d])

def cells(text, name, table=0):
    """The cells of the line that begins with a name, in the so manyeth table that has one."""
    lines = [line for line in text.splitlines() if line.startswith(f'| {name} ')]
    return [cell.strip() for cell in lines[table].split('|')[2:-1]]

def test_interval_and_sign_flips():
    x = np.random.default_rng(0).normal(0.5, 1, 6)
    mean, low, high = report.t_interval(x)
    reference = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((reference.low, reference.high)) and mean == pytest.approx(x.mean())
    reference = stats.permutation_test((x,), np.mean, permutation_type='samples', n_resamples=np.inf)
    assert sign_flip_p(x) == pytest.approx(reference.pvalue)
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64 and sign_flip_p([1]) is None
    assert report.t_interval([2.0]) == (2, None, None)
    # three names, two seeds, nine patterns: a mean of 2 is reached by itself and, with the other sign, by (-2, -2)
    assert exchange_p([[2, -2, 0], [2, -2, 0]]) == pytest.approx(2 / 9)
    # beyond 2^16 patterns they are drawn: an effect and none are told apart as by the t-test
    assert len(patterns(20, 2)) == len(patterns(11, 3)) == 2 ** 16 and not patterns(20, 2)[0].any()
    assert len(patterns(3, 2)) == 8 and len({*map(tuple, patterns(4, 3))}) == 81
    x = np.random.default_rng(1).normal(0.45, 1, 20)
    assert sign_flip_p(x) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.01)

def test_smallest_effect():
    # six seeds must all agree in sign: Phi(d)^6 = 0.8, so d = 1.79
    assert report.smallest_effect([0, 1] * 3) / np.std([0, 1] * 3, ddof=1) == pytest.approx(
        stats.norm.ppf(0.8 ** (1 / 6)), abs=0.01)
    assert report.smallest_effect([1, 2, 3, 4, 5]) is None
    d = np.random.default_rng(0).normal(0, 1, (1500, 8))
    found = [sign_flip_p(x + report.smallest_effect(x) / np.std(x, ddof=1)) <= 0.05 for x in d]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    found = []                                              # of how alike three arms are, one is another order
    for x in np.random.default_rng(0).normal(0, 1, (1500, 6, 3)):
        d = 1.5 * (x - x.mean(1, keepdims=True))            # each minus the mean of the others
        effect = report.smallest_effect(d[:, 0], names=3) / np.std(d[:, 0], ddof=1) * 1.5 ** 0.5
        found.append(exchange_p(d + effect * np.array([1, -0.5, -0.5])) <= 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)

def test_fieller():
    """The ends are where the t-test of x - rho y, paired, turns; there are none where y may be 0."""
    x, y = np.random.default_rng(3).multivariate_normal([0.6, 1], [[0.2, 0.1], [0.1, 0.2]], 8).T
    def p(rho):
        return stats.ttest_1samp(x - rho * y, 0).pvalue - 0.05
    ratio, low, high = report.fieller(dict(enumerate([*x, 99])), dict(enumerate(y)))       # a seed without y
    assert ratio == pytest.approx(x.mean() / y.mean())
    assert (low, high) == pytest.approx((brentq(p, -9, ratio), brentq(p, ratio, 99)))
    y -= 0.9
    assert report.fieller(dict(enumerate(x)), dict(enumerate(y)))[1:] == (None, None) and p(1e6) > 0
    for y in ({0: 2.0}, {0: 0.0, 1: 0.0}):
        assert report.fieller({0: 1.0, 1: 2.0}, y) == (None, None, None)

def test_max_t():
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1, (6, 1))
    assert max_t(d)[0] == pytest.approx(sign_flip_p(d[:, 0]))              # one measure: nothing to adjust
    d = rng.normal(0, 1, (6, 5)) + np.array([3, 0, 0, 0, 0])
    p = max_t(d)
    assert (np.diff(np.array(p)[np.argsort(-np.abs(stats.ttest_1samp(d, 0).statistic))]) >= 0).all()   # step-down
    assert all(a >= sign_flip_p(column) - 1e-12 for a, column in zip(p, d.T)) and p[0] == min(p)
    assert max_t(np.repeat(d[:, :1], 5, axis=1)) == pytest.approx([sign_flip_p(d[:, 0])] * 5)   # copies cost nothing
    for own in (1, 0.44):                                                  # alone, and where measures go together
        alike = (1 - own ** 2) ** 0.5 * rng.normal(0, 1, (1000, 6, 1)) + own * rng.normal(0, 1, (1000, 6, 6))
        rejected = [min(max_t(x)) <= 0.05 for x in alike]
        assert np.mean(rejected) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5  # the family keeps its level
    shift = np.array([2.5, 2.5, 0, 0, 0, 0])                               # two of six measures, at 2.5 SD
    both = [max(max_t(rng.normal(0, 1, (6, 6)) + shift)[:2]) <= 0.05 for _ in range(300)]
    assert np.mean(both) > 0.5                                             # found most of the time

def test_values_of_a_row():
    r = row('topic_c4', 'drope', score_p=0.3) | {'heads': {'entropy': [[1, 1], [2, 4]]}}
    assert (value(r, 'score_p'), value(r, 'val_loss'), value(r, 'probe'), value(r, 'score_o')) == (0.3, 5.1, 0.5, None)
    assert value(r, 'probe.accuracy') == 0.9 and value(r, 'probe.references.untrained') == 0.15
    assert value(r, 'probe.references.ceiling') is None and value(r, 'entropy_last') == 3
    assert value(row('pseudo', 'rope', probe=(0, 0.1, 0.2, 0.3)), 'probe') == 0.1      # three layers: after the first
    assert value(r | {'measures_version': 1}, 'score_p') is None           # this row's P was defined otherwise
    assert '—' == cells(report.summary(HEADER, [r | {'measures_version': 1}]), 'mha_topic_c4_drope')[4]

def test_base_and_placebo():
    orders = ('shuffled', 'topic_c4', 'pseudo_c4', 'topic_ordered_pure', 'shuffled_pure')
    rows = [row(order, 'rope') for order in orders]
    known = [('mha_topic_c4', 'mha_pseudo_c4'), ('mha_topic_ordered_pure', 'mha_shuffled_pure')]
    with_base = ['mha_topic_c4', 'mha_pseudo_c4', 'mha_shuffled_pure']
    found = {tuple(c['arms']) for c in contrasts(rows, COMPARE)}
    assert found == {*known, *((arm, 'mha_shuffled') for arm in with_base)}
    rows += [row('reshuffled', 'rope'), row('shuffled', 'rope') | {'repeat': 1}]
    found = {tuple(c['arms']): c['label'] for c in contrasts(rows, COMPARE)}
    known += [('mha_reshuffled', 'mha_shuffled'), ('mha_shuffled_rerun', 'mha_shuffled')]
    assert found.keys() == {*known, *((arm, 'mha_shuffled', 'mha_reshuffled') for arm in with_base)}
    assert found['mha_topic_c4', 'mha_shuffled', 'mha_reshuffled'] == 'mha_topic_c4 - base'
    assert contrasts(rows[:2], COMPARE | {'base': 'topic'}) == []
    rows = [row(order, 'rope') for order in ('shuffled', 'topic_ordered', 'pseudo')]
    assert [c['arms'][1] for c in contrasts(rows, COMPARE) if c['named']] == ['mha_shuffled']
    # the base is the mean of the shuffles that are there
    rows = [row(order, 'rope', seed, entropy=v) for seed in (0, 1) for order, v in zip(THREE, (5.0, 2.0, 3.0))]
    assert compared(rows[:-1], TOPIC, 'rope', 'entropy')['differences'] == {0: 2.5, 1: 3.0}

def test_effects_are_paired_by_seed():
    rows = []
    for seed in (0, 1):
        rows += [row('shuffled', 'drope', seed, score_p=10 * seed), row('shuffled', 'rope', seed, score_p=5 * seed),
                 row('topic_ordered', 'drope', seed, score_p=10 * seed + 2 + seed),
                 row('topic_ordered', 'rope', seed, score_p=5 * seed + 1),
                 row('topic_ordered', 'drope', seed, steps=99, main=False, score_p=77)]
    header = HEADER | {'compare': COMPARE | {'primary': ['score_p', 'topic_ordered', 'rope']}}
    found = {(e['measure'], e['where']): e for e in effects(header, rows)}
    primary, other, explored = (found[key] for key in (('score_p', 'rope'), ('score_p', 'drope'), ('within', 'drope')))
    assert (primary['kind'], primary['differences'], primary['p']) == ('primary', {0: 1, 1: 1}, 0.5)
    assert (other['kind'], other['differences']) == ('tested', {0: 2, 1: 3}) and explored['kind'] == 'explored'
    assert [e['p_adjusted'] is None for e in (primary, other, explored)] == [True, False, True]
    tested = {key for key, e in found.items() if e['kind'] == 'tested'}
    assert tested == {('score_p', 'drope'), *itertools.product(('val_loss', 'probe'), ('rope', 'drope'))}
    one = effects(header, [r for r in rows if r['seed'] == 0])
    assert all((e['low'], e['p'], e['p_adjusted']) == (None, None, None) for e in one)
    assert sum(m.role == 'tested' for m in report.MEASURES.values()) * len(report.FAMILY) <= 12

def test_adjusted_over_common_seeds():
    rows = [row(order, 'rope', seed, score_p=v + seed, score_o=None if (order, seed) == ('topic_ordered', 3) else v)
            for seed in range(4) for order, v in (('shuffled', 0.0), ('topic_ordered', 1.0))]
    tested = [e for e in effects(HEADER, rows) if e['kind'] == 'tested']
    assert {e['n'] for e in tested} == {3, 4} and all(e['p_adjusted'] is not None for e in tested)

@pytest.mark.parametrize('kept, p', [(1, 2 / 64), (0, None)])
def test_after_drope_the_primary_wants_its_check(kept, p):
    """Six seeds with an effect after DroPE: read where kept RoPE shows it, and the course tells their ratio."""
    rows = []
    for seed, steps, (where, v) in itertools.product(range(6), (10, 40), (('drope', 0.5), ('kept', kept))):
        rows.append(row('shuffled', where, seed, steps, steps == 10))
        rows.append(row('topic_ordered', where, seed, steps, steps == 10, score_p=v * steps / 10 + 0.1 * (-1) ** seed))
    primary, = (e for e in effects(HEADER, rows) if e['kind'] == 'primary')
    assert primary['p'] == p
    for c in course(HEADER, rows):
        ratio, low, _ = c['ratio']
        assert c['drope']['mean'] == pytest.approx(c['steps'] / 20) and (low is None) == (not kept)
        assert not kept or ratio == pytest.approx(0.5)
    text = report.summary(HEADER, rows)
    line = cells(text, 'mha_topic_ordered - mha_shuffled')
    assert line[0] == '10' and ('p 0.031' in line[2]) == (p is not None)
    assert line[3:5] == (['+0.50', '+0.44'] if kept else ['—', '—'])
    assert 'mha_shuffled_drope, 40 steps' in text and '| **+0.5000 ±' in text

def three_runs(rng, seeds=8, shared=1.0, topic=0.0, reliability=0.9):
    """Rows of topic and of two shuffles: profiles of 2 x 8 heads with a shared part, CKA between any two."""
    rows = []
    for seed in range(seeds):
        common, cka = rng.normal(0, shared, (2, 8)), rng.uniform(0.7, 0.95, 3) - [topic / 4, topic / 4, 0]
        for order in THREE:
            here = topic * (order == THREE[0])
            P = common + rng.normal(0, 1 + 3 * here, (2, 8))
            heads = {'score_p': P.tolist(), 'entropy': rng.normal(here, 1, (2, 8)).tolist()}
            rows.append(row(order, 'rope', seed) | {'heads': heads, 'reliability': reliability, 'cka': {}})
        rows[-3]['cka'] = {'mha_shuffled_rope': cka[0], 'mha_reshuffled_rope': cka[1]}
        rows[-2]['cka'] = {'mha_reshuffled_rope': cka[2]}
    return rows

@pytest.mark.parametrize('measure', ['entropy_last', 'profile', 'cka'])
def test_level_and_power(measure):
    """Three exchangeable runs: p is under .05 in 5% of experiments, whatever two profiles share."""
    rng = np.random.default_rng(0)
    p = [compared(three_runs(rng), TOPIC, 'rope', measure)['p'] for _ in range(600)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.025)
    e = compared(three_runs(rng, topic=1.0), TOPIC, 'rope', measure)
    assert e['p'] < 0.05 and e['low'] > 0

def test_profile_and_cka_by_hand():
    rows = three_runs(np.random.default_rng(2), seeds=2)
    c = [np.log(1 - x) for x in (*rows[0]['cka'].values(), *rows[1]['cka'].values())]
    assert compared(rows, TOPIC, 'rope', 'cka')['differences'][0] == pytest.approx((c[0] + c[1]) / 2 - c[2])
    P = [np.array(r['heads']['score_p']) for r in rows[:3]]
    z = np.arctanh(np.corrcoef([(x - x.mean(1)[:, None]).ravel() for x in P]) - np.eye(3))
    e = compared(rows, TOPIC, 'rope', 'profile')
    assert e['differences'][0] == pytest.approx(z[1, 2] - (z[0, 1] + z[0, 2]) / 2)
    e = compared(three_runs(np.random.default_rng(2), 4, topic=1.0), TOPIC, 'rope', 'cka')
    assert e['p'] < 2 / 2 ** 4                                             # of 3^4 exchanges, not 2^4 signs
    for reliability in (0.9, 0.79):
        made = three_runs(np.random.default_rng(2), reliability=reliability)
        assert ('profile' in {e['measure'] for e in effects(HEADER, made)}) == (reliability >= 0.8)
    two = [r for r in rows if r['order'] != 'reshuffled']
    assert compared(two, TOPIC, 'rope', 'cka')['n'] == 0                   # not from one shuffle
    assert np.isnan(report.alike({}, rows[0], 'profile'))                  # not analysed yet
    many = three_runs(np.random.default_rng(1), 12)                        # so many that exchanges are drawn
    for measure in report.PAIRS:                                           # and no shuffle is the first
        a, b = (compared(many, contrast, 'rope', measure) for contrast in (TOPIC, SWAPPED))
        assert (a['mean'], a['p']) == pytest.approx((b['mean'], b['p'])) and a['n'] == 12

def test_equal_loss():
    """Arms that differ in loss alone do not differ at equal loss; a shift of the measure is found; no extrapolation."""
    rows = []
    for seed, (order, losses) in itertools.product(range(3), {
            'shuffled': (0.5, 0.3, 0.1), 'topic_ordered': (0.4, 0.2, 0.05), 'pseudo': (0.4, 0.2),
            'topic_c4': (0.9, 0.8)}.items()):                              # the last is never as good as the others
        shift = (0.1 + 0.01 * seed) * (order == 'pseudo')
        for i, x in enumerate(losses):
            rows.append(row(order, 'drope', seed, i + 1, i == 0, excess=x, probe=(0, 0.9 - 0.5 * x + shift, 0)))
        rows.append(row(order, 'drope', seed, 0, False, excess=2, probe=(0, 9, 0)))        # length 0
    found = {(*m['arms'], m['measure']): m for m in matched(HEADER, rows)}
    same, shifted = found['mha_topic_ordered', 'mha_shuffled', 'probe'], found['mha_pseudo', 'mha_shuffled', 'probe']
    assert same['mean'] == pytest.approx(0, abs=1e-9) and same['n'] == 3
    assert shifted['mean'] == pytest.approx(0.11) and shifted['low'] > 0.08 and shifted['p'] == 0.25
    assert found['mha_topic_ordered', 'mha_pseudo', 'probe']['mean'] == pytest.approx(-0.11)
    never = [m for arms, m in found.items() if 'mha_topic_c4' in arms]
    assert never and all(m['n'] == 0 and m['mean'] is None for m in never)
    assert 'mha_pseudo - ' not in report.summary(HEADER, rows).split('## ')[0]

def test_report_with_one_seed_and_with_several():
    bigram = {'equal': {'score_p': 0.138, 'score_o': 0.216}, 'posterior': None}
    heads = {'score_p': [[None, 0.1], [0.3, 0.2]]}
    rows = [row(order, positions, seed) | {'bigram': bigram, 'heads': heads} for seed in (0, 1)
            for order in ('shuffled', 'topic_ordered') for positions in ('rope', 'drope', 'kept')]
    text = report.summary(HEADER, rows, ['loss.png'])
    first = ['5.1000 ± 0.0000', '50.0% ± 0.0%', '1.00 ± 0.00', '50.0% ± 0.0%', '+0.000 ± 0.000', '+0.300 ± 0.000', '2']
    assert cells(text, 'mha_topic_ordered_drope') == first
    assert cells(text, 'chance') == ['5.5000', '30.0%', '—', '20.0%', '+0.000', '—', '']
    two = '\n'.join(report.rows_table([row('shuffled', 'rope'), row('shuffled', 'near') | {'uniform': {'within': 0.6}}],
                                      {'within': 'Within'}))
    assert (cells(two, 'chance, rope'), cells(two, 'chance, near')) == (['30.0%', ''], ['60.0%', ''])
    differences = 'mha_topic_ordered - mha_shuffled, drope'
    assert cells(text, differences)[0] == '+0.0000 ± 0.0000' and 'p 1, p_adjusted 1' in cells(text, differences, 1)[0]
    assert 'figures/loss.png' in text and 'P, topic_ordered - base, drope' in text and '## Circuits' not in text
    assert text.split('## Realised order')[1].split('## ')[0].count('| mha_') == 2        # trained runs alone
    assert '+0.138 ± 0.000' in text and '## At equal loss' not in text and 'One seed' not in text
    one = report.summary(HEADER, rows[:6])
    assert 'One seed' in one and 'nan' not in one and '±' not in one and cells(one, differences, 1)[0] == '+0.0000, n 1'
    assert one.count('mha_topic_ordered - mha_shuffled') == 6              # 3 positions, 2 of them twice, the course

# -----------------------------------------------------------------------------
# figures: all are drawn, also for orders and positions that plot.py has never heard of

def made_up(order, positions, seed, recal_steps=None, main=True):
    """A row of a model with 2 layers of 3 heads and 9 topics; a head and a lens without a number."""
    p = [[0.1 * seed, None, 0.3], [0.1, 0.2, 0.4]]
    ranks = [[3.0, 4.0, 5.0]] * 2
    by_depth = [1.0, 0.5, 0.6, 0.6, 0.7]
    lens = {'value': [None] + by_depth[1:], 'chance': [None, 0.5, 0.5, 0.5, 0.5], 'chance_sd': [None] + [0.01] * 4}
    return row(order, positions, seed, recal_steps, main, score_p=seed + len(order), within=None) | {
        'bigram': {'equal': {'score_p': 0.14, 'score_o': 0.2}, 'posterior': None},
        'val_loss': 3.2 - (recal_steps or 0) / 100 + 0.01 * seed, 'excess': None,
        'references': {'uniform': 4.0, 'bigram': 3.5, 'filter': None, 'oracle': None}, 'device': 'cpu', 'versions': {},
        'heads': {'score_p': p, 'qk_rank': ranks, 'ov_rank': ranks},
        'probe': {'accuracy': [0.2, 0.4, 0.9], 'references': {'token': 0.3, 'ceiling': None, 'untrained': [0.2] * 3},
                  'by_distance': {'distance': [0, 1, 2, 4], 'accuracy': [0.2, 0.3, 0.5, 0.8], 'ceiling': None}},
        'init_rank': {'qk_rank': [5.0, 5.0], 'ov_rank': None}, 'lens': {'projection': lens, 'projection_others': lens},
        'curve': {'step': [0, 10, 20], 'val_loss': [4.0, None, 3.0], 'topics': [[0] * 9, [8] + [0] * 8, [1] * 9]},
        'config': {'seed': seed}}

def written(folder, seeds):
    """An experiment of made-up rows of these seeds, as plot.py reads it."""
    rows = []
    for order in ('shuffled', 'reverse', 'pseudo'):
        for seed in seeds:
            rows += [made_up(order, 'rope', seed), made_up(order, 'alibi', seed)]
            for where in ('drope', 'kept'):
                rows += [made_up(order, where, seed, 5), made_up(order, where, seed, 9, main=False)]
    pixels = base64.b64encode(zlib.compress(np.eye(8, dtype=np.uint8).tobytes())).decode()
    example = {'layer': 1, 'head': 2, 'score_p': None, 'topics': [0, 0, 8, 8, 8, 1, 1, 1], 'uint8': pixels}
    header = HEADER | {'compare': COMPARE | {'primary': ['score_p', 'reverse', 'drope']}}
    runs.write_text(f'{folder}/runs.jsonl', runs.dump_rows(header, rows))
    runs.write_json(f'{folder}/examples.json', {'mha_reverse_rope': example})
    return plot.load(str(folder))

@pytest.mark.parametrize('seeds', [(0, 1), (3,)])
def test_every_figure_is_drawn(tmp_path, seeds):
    assert f'n = {len(seeds)}' in written(tmp_path, seeds).note
    succeeds(run('plot.py', str(tmp_path)))
    sizes = [path.stat().st_size for path in (tmp_path / 'figures').iterdir()]
    assert len(sizes) == 8 and min(sizes) > 5000

def test_figures_show_the_rows(tmp_path):
    """P of a head is the mean over seeds at its place, the order begins at step 0, effects and course are
    report.py's."""
    exp = written(tmp_path, seeds=(0, 1))
    panels = [ax for ax in plot.plot_heads(exp).axes if ax.get_title().startswith('mha_reverse_drope')]
    assert np.ma.allclose(panels[0].images[0].get_array()[:, [0, 2]], [[0.05, 0.3], [0.1, 0.4]]) and len(panels) == 1
    areas = plot.plot_order(exp).axes[0].collections
    edges = np.concatenate([area.get_paths()[0].vertices[:, 0] for area in areas])
    assert len(areas) == 9 and (edges.min(), edges.max()) == (0, 20)
    panels = plot.plot_effects(exp).axes
    panel = next(ax for ax in panels if ax.get_title() == 'P')
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    marks = {tuple(line.get_xydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1}
    assert {y for _, y in marks} == set(range(len(labels)))
    assert (len('reverse') - len('shuffled'), labels.index('mha_reverse - mha_shuffled, alibi')) in marks
    ax, = plot.plot_course(exp).axes                        # the primary measure, beside the control with RoPE kept
    shown = dict(zip(*reversed(ax.get_legend_handles_labels())))
    of = 'mha_reverse - mha_shuffled, '
    assert shown.keys() == {of + 'rope', of + 'kept', of + 'drope', 'mha_pseudo - mha_shuffled, drope'}
    faint = [line.get_ydata() for line in ax.lines if line.get_alpha() == 0.2]          # 2 seeds, kept and dropped
    for y in (shown[of + 'rope'].get_ydata(), shown[of + 'kept'].lines[0].get_ydata(), *faint):
        assert np.allclose(y, len('reverse') - len('shuffled')) and len(y) == 2 and len(faint) == 4
