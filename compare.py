"""
What finished runs allow to be said: paired differences over seeds, exact tests, equal-loss comparisons, the verdict.

run_experiment.py calls these on the rows of summary.json (`summarise`) and on the runs' logs. Nothing here knows a
model. A seed is one (data, initialisation) pair that all arms share: the unit of every interval and test.
"""
import functools
import itertools

import numpy as np
from scipy import stats

# -----------------------------------------------------------------------------
# the seed is the unit, arms are compared in pairs

def t_interval(x):
    """(mean, low, high): the 95% t-interval of a sample; low and high None for a sample of one."""
    mean = float(np.mean(x))
    if len(x) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half

def sign_flips(n):
    """All 2^n sign vectors [2^n, n]."""
    return np.array(list(itertools.product((1, -1), repeat=n)))

def sign_flip_p(d):
    """Exact two-sided p of a paired difference: the share of sign flips with a mean as far from 0. None if n = 1."""
    if len(d) < 2:
        return None
    means = np.abs(sign_flips(len(d)) @ np.asarray(d)) / len(d)
    return float((means >= abs(np.mean(d)) - 1e-12).mean())

def max_t(d):
    """
    Step-down max-|T| p-values [m] of m measures on n seeds, d [n, m]: a seed flips all its measures together, so
    their correlation is kept (Westfall & Young 1993, algorithm 4.1; Romano & Wolf 2005). None if n = 1.
    """
    d = np.asarray(d, float)
    n, m = d.shape
    if n < 2:
        return [None] * m
    flipped = sign_flips(n) @ d / n                                                        # [2^n, m] means
    sd = np.sqrt(np.maximum((d ** 2).mean(0) - flipped ** 2, 1e-30))                       # flips keep the squares
    T = np.abs(flipped) / sd
    order, p, running = np.argsort(-T[0]), np.empty(m), 0.0                                # the first row flips nothing
    for i, k in enumerate(order):
        top = T[:, order[i:]].max(1)
        running = max(running, float((top >= T[0, k] * (1 - 1e-9)).mean()))
        p[k] = running
    return p.tolist()

@functools.cache
def smallest_effect(n):
    """
    The paired difference, in SDs of it, that the sign-flip test at 5% finds in 80% of samples of n seeds (normal ones,
    simulated); None where no p can be that small: below 6 seeds.
    """
    if n < 6:
        return None
    if n > 10:
        return 2.8 / n ** 0.5                               # the normal test's, close enough by then
    noise, flips = np.random.default_rng(0).normal(0, 1, (4000, n)), sign_flips(n)
    for effect in np.arange(0.5, 3, 0.05):
        means = np.abs((noise + effect) @ flips.T)          # [4000, 2^n]; the first column flips nothing
        p = (means >= means[:, :1] - 1e-12).mean(1)
        if (p <= 0.05).mean() >= 0.8:
            return float(effect)

def base(order):
    """What an order is compared with: shuffled rows with windows of its own kind; shuffled pure windows with mixed."""
    if order == 'shuffled':
        return None
    return 'shuffled_pure' if order.endswith('_pure') and order != 'shuffled_pure' else 'shuffled'

def pseudo(order):
    """The same schedule by a label without meaning; of other orders itself."""
    return order.replace('topic_ordered', 'pseudo').replace('topic_', 'pseudo_')

MEASURES = ('score_p', 'val_loss', 'within', 'score_o', 'entropy', 'probe')

def effects(runs):
    """
    Paired differences between arms at the main recalibration length: at each stage (rope, kept, drope, nope) and, as
    'drope - kept', the difference of two. Primary: score_p, topic_ordered - shuffled, drope - kept; its p stands
    alone, all the others of an attention type are adjusted together (p_adjusted). smallest: what 80% power reaches.
    """
    value, names = {}, {}                                   # (measure, condition, seed) -> value; attention -> orders
    for r in runs:
        names.setdefault(r['attention'], {})[r['order']] = True
        for m in MEASURES:
            v = middle(r, m)
            if r['main'] and v is not None:
                value[m, r['condition'], r['seed']] = v
    result = []
    for attention, orders in names.items():
        pairs = [(a, base(a)) for a in orders if base(a) in orders]
        for a in orders:
            b = pseudo(a)
            pairs += [(a, b)] if a != b in orders else []
        family = []
        for (a, b), where, m in itertools.product(pairs, ('drope - kept', 'drope', 'kept', 'rope', 'nope'), MEASURES):
            terms = [(sign * flip, f'{attention}_{arm}_{kind}') for flip, kind in zip((1, -1), where.split(' - '))
                     for sign, arm in ((1, a), (-1, b))]
            having = [{seed for measure, name, seed in value if (measure, name) == (m, n)} for _, n in terms]
            shared = sorted(set.intersection(*having))
            if not shared:
                continue
            d = [sum(sign * value[m, name, seed] for sign, name in terms) for seed in shared]
            mean, low, high = t_interval(d)
            primary = (m, a, b, where) == ('score_p', 'topic_ordered', 'shuffled', 'drope - kept')
            result.append({'measure': m, 'contrast': f'{attention} {a} - {b}, {where}', 'mean': mean, 'low': low,
                           'high': high, 'n': len(d), 'p': sign_flip_p(d), 'p_adjusted': None, 'primary': primary,
                           'smallest': smallest_effect(len(d)) and smallest_effect(len(d)) * float(np.std(d, ddof=1)),
                           'seeds': shared, 'differences': d})
            family += [] if primary else [result[-1]]
        # a flip must flip the same seeds in all of them: those that every effect has
        common = sorted(set.intersection(*(set(e['seeds']) for e in family))) if family else []
        if common:
            d = np.array([[e['differences'][e['seeds'].index(seed)] for e in family] for seed in common])
            for e, p in zip(family, max_t(d)):
                e['p_adjusted'] = p
    return result

# -----------------------------------------------------------------------------
# at equal loss: what an arm knows beside what it predicts

def middle(r, measure):
    """A row's measure; of the probe that after half of the layers."""
    return r['probe'][(len(r['probe']) - 1) // 2] if measure == 'probe' else r[measure]

def matched(runs, points=25):
    """
    Differences between arms at equal validation loss, along the recalibration lengths of DroPE.

    For each seed a measure is interpolated linearly in the loss above that seed's filter, through its lengths sorted by
    loss, inside the range where both arms have points and never beyond. Length 0, a model that never recovered, is
    left out, and the average is taken over the logarithm of the loss. Returns [{'attention', 'arms', 'measure',
    'loss': grid of nats above the filter, 'mean', 'low', 'high', 'n': of each grid point; 'average': t-interval and
    'p': sign flips of each seed's mean difference over its range, 'seeds': how many have one}]; arms with fewer than
    two lengths are left out; where arms never have the same loss the lists are empty, 'average' and 'p' None, 'seeds'
    0.
    """
    curves, result = {}, []                                 # (attention, order, seed) -> rows by rising loss
    for r in sorted(runs, key=lambda r: r['excess']):
        if r['stage'] == 'drope' and r['recal_steps'] and r['excess'] > 0:
            curves.setdefault((r['attention'], r['order'], r['seed']), []).append(r)
    arms = dict.fromkeys((attention, order) for attention, order, _ in curves)
    for (attention, a), measure in itertools.product(arms, ('score_p', 'probe')):
        for b in dict.fromkeys((base(a), pseudo(a))):
            pairs = [(curves[attention, a, seed], curves[attention, b, seed]) for at, order, seed in curves
                     if (at, order) == (attention, a) and (attention, b, seed) in curves]
            pairs = [(x, y) for x, y in pairs if min(len(x), len(y)) > 1]
            if a == b or not pairs:
                continue
            ranges = [(max(x[0]['excess'], y[0]['excess']), min(x[-1]['excess'], y[-1]['excess'])) for x, y in pairs]
            if not any(low < high for low, high in ranges):
                result.append({'attention': attention, 'arms': [a, b], 'measure': measure, 'loss': [], 'mean': [],
                               'low': [], 'high': [], 'n': [], 'average': (None, None, None), 'p': None, 'seeds': 0})
                continue
            grid = np.geomspace(min(r[0] for r in ranges), max(r[1] for r in ranges), points)
            at = lambda rows, loss: np.interp(loss, [r['excess'] for r in rows], [middle(r, measure) for r in rows])
            d = np.array([np.where((grid >= low) & (grid <= high), at(x, grid) - at(y, grid), np.nan)
                          for (x, y), (low, high) in zip(pairs, ranges)])          # [seeds, points]
            cells = [t_interval(column[~np.isnan(column)]) if (~np.isnan(column)).any() else (None,) * 3
                     for column in d.T]
            mine = [float(np.mean(at(x, fine) - at(y, fine))) for (x, y), (low, high) in zip(pairs, ranges)
                    if low < high for fine in (np.geomspace(low, high, 200),)]
            result.append({'attention': attention, 'arms': [a, b], 'measure': measure, 'loss': grid.tolist(),
                           **{k: [c[i] for c in cells] for i, k in enumerate(('mean', 'low', 'high'))},
                           'n': (~np.isnan(d)).sum(0).tolist(), 'average': t_interval(mine), 'p': sign_flip_p(mine),
                           'seeds': len(mine)})
    return result

def recovery(runs, logs, above=(0.5, 0.2, 0.1, 0.05, 0.02)):
    """
    Steps until the longest recalibration of each arm and seed comes within `above` nats of its filter: [{'condition',
    'seed', 'loss': above, 'steps': [steps, or null where it never does]}], between evaluations by a straight line.

    logs: condition, seed, recal_steps -> records of log.jsonl. runs: rows with a filter ('excess').
    """
    longest = {}
    for r in runs:
        before = longest.get((r['condition'], r['seed']), r)
        if r['stage'] in ('drope', 'kept') and r['recal_steps'] >= before['recal_steps']:
            longest[r['condition'], r['seed']] = r
    result = []
    for (condition, seed), r in longest.items():
        floor = r['val_loss'] - r['excess']
        curve = [(e['step'], e['val_loss'] - floor) for e in logs[condition, seed, r['recal_steps']]
                 if e.get('val_loss') is not None]
        steps = []
        for target in above:
            i = next((i for i, (_, loss) in enumerate(curve) if loss <= target), None)
            if i:                                           # crossed between two evaluations
                (s0, l0), (s1, l1) = curve[i - 1:i + 1]
                steps.append(s0 + (s1 - s0) * (l0 - target) / (l0 - l1))
            else:
                steps.append(None if i is None else 0.0)
        result.append({'condition': condition, 'seed': seed, 'loss': list(above), 'steps': steps})
    return result

def recovery_effects(recovered):
    """Paired differences of log2(steps to recover) under DroPE, arm - base, at each target that both arms of at least
    one seed reach: [{'contrast', 'loss', 'mean', 'low', 'high', 'n', 'p'}]; -1: in half the steps. Exploratory."""
    steps = {(r['condition'], r['seed'], loss): s for r in recovered for loss, s in zip(r['loss'], r['steps']) if s}
    result = []
    for name, loss in dict.fromkeys((name, loss) for name, _, loss in steps if name.endswith('_drope')):
        attention, order = name.removesuffix('_drope').split('_', 1)
        other = f'{attention}_{base(order)}_drope'
        d = [float(np.log2(s / steps[other, seed, loss])) for (at, seed, l), s in steps.items()
             if (at, l) == (name, loss) and (other, seed, loss) in steps]
        if d:
            result.append({'contrast': f'{attention} {order} - {base(order)}', 'loss': loss, 'n': len(d),
                           **dict(zip(('mean', 'low', 'high'), t_interval(d))), 'p': sign_flip_p(d)})
    return result

# -----------------------------------------------------------------------------
# what the order did while training ran

def orderedness(records):
    """Mutual information of the step (bins of the log) and the dominant topic of a row, over the entropy of the
    topics: 1 if the step tells the topic, about (K-1)/(2 rows a bin) / H, near 0, for shuffled rows. None without."""
    counts = np.array([r['topics'] for r in records if sum(r.get('topics') or [])], float)      # [bins, K]
    if not len(counts):
        return None
    p = counts / counts.sum()
    entropy = lambda q: -float((q[q > 0] * np.log(q[q > 0])).sum())
    H = entropy(p.sum(0))
    return (H + entropy(p.sum(1)) - entropy(p)) / H if H else None

def forgetting(logs, edges=(0, 1, 100, 200, 400, 800, 1600, 3200)):
    """
    How much is lost on a topic since it was last seen: [{'condition', 'since': lower edges in steps, 'excess', 'n'}].

    excess: validation loss on tokens of a topic minus the same in the shuffled arm of that seed at that step, the mean
    over topics, steps and seeds, without topics that were never seen. Of arms with mixed windows, as shuffled has.
    logs: (attention, order, seed) -> records, with 'since' and 'val_loss_topics'.
    """
    found = {}
    for (attention, order, seed), records in logs.items():
        if order == 'shuffled_pure':
            continue                                        # differs from its base in the windows, not in the order
        reference = {r['step']: r for r in logs.get((attention, base(order), seed), ()) if r.get('val_loss_topics')}
        for r in records:
            if r.get('val_loss_topics') and r['step'] in reference and r['step']:
                for loss, calm, since in zip(r['val_loss_topics'], reference[r['step']]['val_loss_topics'], r['since']):
                    if loss is not None and since < r['step']:
                        cell = int(np.searchsorted(edges, since, side='right')) - 1
                        found.setdefault(f'{attention}_{order}_rope', {}).setdefault(cell, []).append(loss - calm)
    return [{'condition': name, 'since': [edges[k] for k in sorted(cells)],
             'excess': [float(np.mean(cells[k])) for k in sorted(cells)], 'n': [len(cells[k]) for k in sorted(cells)]}
            for name, cells in found.items()]

# -----------------------------------------------------------------------------
# the verdict

def verdict(summary):
    """
    A few sentences for each attention type: what the primary measure allows to be said, and no more.

    The primary measure is a difference of differences: it can move because DroPE or because keeping RoPE changed
    something. 'Under DroPE' is said only where the simple difference there moves too, after adjustment.
    """
    lines, by = [], {(e['measure'], e['contrast']): e for e in summary['effects']}
    show = lambda mean, low, high: f'{mean:+.4f}' + ('' if low is None else f' [{low:+.4f}, {high:+.4f}]')
    for e in (e for e in summary['effects'] if e['primary']):
        (attention, arms), n = e['contrast'].removesuffix(', drope - kept').split(' ', 1), e['n']
        name = attention.upper()
        if n == 1:
            lines.append(f'{name}: one seed ({e["mean"]:+.4f}): no test, nothing can be concluded.')
            continue
        def moves(measure):                                 # under DroPE itself, in the direction of the primary one
            d = by.get((measure, f'{attention} {arms}, drope'))
            return d is not None and (d['p_adjusted'] or 1) <= 0.05 and d['mean'] * e['mean'] > 0
        found = f'{show(e["mean"], e["low"], e["high"])}, sign-flip p = {e["p"]:.3f}, n = {n}'
        line = f'{name}: the effect of topic order on P '
        if e['p'] <= 0.05:
            line += f'differs between DroPE and kept RoPE ({found})'
            if moves('score_p'):
                line += ', and is there under DroPE; ' + (
                    'O agrees: topic, or tokens that tell it, not contiguity.' if moves('score_o') else
                    'O does not show it, so it may be contiguity.')
            else:
                line += ', but under DroPE itself no effect is shown: what differs is the kept arm.'
        else:
            line += f'is not shown to differ between DroPE and kept RoPE ({found}); '
            line += (f'with {n} seeds no p can be below 0.05, take six or more.' if e['smallest'] is None else
                     f'a difference of {e["smallest"]:.4f} would have been found in four of five such experiments.')
        d = by.get(('score_p', f'{attention} {arms}, drope'))
        line += f' Under DroPE alone: {show(d["mean"], d["low"], d["high"])}' + (
            f', adjusted p = {d["p_adjusted"]:.3f}.' if d['p_adjusted'] else '.')
        equal = {m['measure']: m for m in summary.get('matched', ()) if m['arms'] == arms.split(' - ')
                 and m['attention'] == attention and m['seeds']}
        if equal:
            line += ' At equal loss along DroPE (exploratory, unadjusted): ' + ', '.join(
                f'{label} {show(*equal[key]["average"])}' + (f', p = {equal[key]["p"]:.3f}' if equal[key]['p'] else '')
                for key, label in (('score_p', 'P'), ('probe', 'probe'))) + '.'
        lines.append(line)
    return lines
