"""
What finished runs allow to be said: statistics and tables, from the rows of an experiment alone.

    python report.py out/structured             # writes out/structured/summary.md; results/structured as well

A seed is one (data, initialisation) pair that all arms share: it is the unit of every interval and every test,
and arms are compared in pairs. What is compared with what are data of the experiment: `base`, `placebo` and
`primary` in the first line of its runs.jsonl. Everything is computed from rows here, and nothing is stored but
the text.
"""
import functools
import itertools
import os
from typing import NamedTuple

import numpy as np
from scipy import stats

import runs
from configurator import command

# -----------------------------------------------------------------------------
# the table of measures: what report and figures know of a number in a row

class Measure(NamedTuple):
    heading: str            # as tables and figures call it
    unit: str               # of an axis
    format: str             # of a number
    chance: str = ''        # its level without structure: uniform (attention), init (weights), majority, zero
    tested: bool = False    # in the family whose p-values are adjusted together
    table: str = 'main'     # the table that has it as a column
    since: int = 1          # the version of the measures that defines it so: older rows show a dash

MEASURES = {
    'val_loss': Measure('Val loss', 'nats per token', '.4f', tested=True),
    'gap_closed': Measure('Gap closed', 'share', '.1%'),
    'within': Measure('Within', 'share of attention', '.1%', 'uniform', tested=True),
    'within_all': Measure('Within, all', 'share of attention', '.1%', 'uniform'),
    'within_cross_ratio': Measure('Within / cross', 'ratio', '.2f'),
    'entropy': Measure('Entropy', 'nats', '.2f', 'uniform', tested=True),
    'entropy_within': Measure('Entropy within', 'nats', '.2f'),
    'entropy_cross': Measure('Entropy cross', 'nats', '.2f'),
    'probe': Measure('Probe', 'accuracy', '.1%', 'majority', tested=True),
    'score_p': Measure('P', 'log ratio', '+.3f', 'zero', tested=True),
    'score_o': Measure('O', 'log ratio', '+.3f', 'zero', tested=True),
    'probe.accuracy': Measure('Probe', 'accuracy', '.1%', 'majority', table='probe'),
    'probe.references.token': Measure('Token identity', 'accuracy', '.1%', table='probe'),
    'probe.references.running_mean': Measure('Running mean', 'accuracy', '.1%', table='probe'),
    'probe.references.untrained': Measure('Untrained', 'accuracy', '.1%', table='probe'),
    'probe.references.control': Measure('Control task', 'accuracy', '.1%', table='probe'),
    'probe.references.ceiling': Measure('Bayes filter', 'accuracy', '.1%', table='probe'),
    'qk_rank': Measure('QK rank', 'effective rank', '.1f', 'init', table='circuits'),
    'ov_rank': Measure('OV rank', 'effective rank', '.1f', 'init', table='circuits'),
    'orderedness': Measure('Orderedness', '0 to 1', '.3f', table='order')}

FAMILY = ('rope', 'drope')          # the tested family: what order installs, and what of it is there after DroPE

def middle(row):
    """The layer that `probe` alone means: n_layer // 2."""
    return (len(part(row, 'probe.accuracy') or [None]) - 1) // 2

def part(row, path):
    """'probe.accuracy' of a row; None where something on the way is missing."""
    for key in path.split('.'):
        row = (row or {}).get(key)
    return row

def value(row, key):
    """
    The number of a measure in a row, None where it is undefined or was defined otherwise: of its own, the mean over
    heads, the probe after its middle layer, or, of a list by layer named 'probe.accuracy', the last.
    """
    if row['measures_version'] < MEASURES[key].since:
        return None
    if key == 'probe':
        accuracy = part(row, 'probe.accuracy')
        return accuracy[middle(row)] if accuracy else None
    found = part(row, key if '.' in key or key in row else f'mean.{key}')
    return found[-1] if isinstance(found, list) else found

def chance(row, key):
    """The level of a measure without structure, on the rows of this run; None where it has none."""
    level = MEASURES[key].chance
    if level == 'zero':
        return 0.0
    if level == 'majority':
        return part(row, 'probe.references.majority')
    return part(row, f'uniform.{key}')

def loss_above(row):
    """Nats above the Bayes filter; the validation loss itself where there is no filter."""
    return row['val_loss'] if row['excess'] is None else row['excess']

# -----------------------------------------------------------------------------
# tests on paired differences

def t_interval(x):
    """(mean, low, high): the 95% t-interval of a sample; low and high None for a sample of one."""
    mean = float(np.mean(x))
    if len(x) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half

@functools.cache
def sign_flips(n, exact=16):
    """Sign vectors [2^n, n], the first flips nothing; beyond `exact` seeds 2^exact random ones, always the same."""
    if n <= exact:
        return np.array(list(itertools.product((1, -1), repeat=n)))
    flips = np.random.default_rng(0).choice((1, -1), (2 ** exact, n))
    flips[0] = 1
    return flips

def sign_flip_p(d):
    """Two-sided p of a paired difference: the share of sign flips with a mean as far from 0. None if n = 1."""
    if len(d) < 2:
        return None
    means = np.abs(sign_flips(len(d)) @ np.asarray(d)) / len(d)
    return float((means >= abs(np.mean(d)) - 1e-12).mean())

def max_t(d):
    """
    Step-down max-|T| p-values [m] of m measures on n seeds, d [n, m]: a seed flips all its measures together,
    so their correlation is kept (Westfall & Young 1993, algorithm 4.1; Romano & Wolf 2005). None if n = 1.
    """
    d = np.asarray(d, float)
    n, m = d.shape
    if n < 2:
        return [None] * m
    flipped = sign_flips(n) @ d / n                                             # [flips, m] means
    sd = np.sqrt(np.maximum((d ** 2).mean(0) - flipped ** 2, 1e-30))            # flips keep the squares
    T = np.abs(flipped) / sd
    order = np.argsort(-T[0])                                                   # the first row flips nothing
    p, running = np.empty(m), 0.0
    for i, k in enumerate(order):
        top = T[:, order[i:]].max(1)                                            # of the measures not yet rejected
        running = max(running, float((top >= T[0, k] * (1 - 1e-9)).mean()))
        p[k] = running
    return p.tolist()

@functools.cache
def smallest_effect(n):
    """
    The paired difference, in SDs of it, that the sign-flip test at 5% finds in 80% of samples of n seeds
    (normal ones, simulated); None where no p can be that small: below 6 seeds.
    """
    if n < 6:
        return None
    if n > 10:
        return 2.8 / n ** 0.5                               # the normal test's, close enough by then
    noise = np.random.default_rng(0).normal(0, 1, (4000, n))
    for effect in np.arange(0.5, 3, 0.05):
        means = np.abs((noise + effect) @ sign_flips(n).T)  # [4000, 2^n]; the first column flips nothing
        p = (means >= means[:, :1] - 1e-12).mean(1)
        if (p <= 0.05).mean() >= 0.8:
            return float(effect)

# -----------------------------------------------------------------------------
# what is compared with what

def contrasts(rows, compare):
    """
    What is compared: every arm with the base, in windows of its own kind (pure windows of the base itself with
    mixed ones), and with the placebo in the same passes. Dicts: attention, arms (two names), named (the
    primary's pair).
    """
    found = []
    known = {runs.arm_name(row): row for row in rows}
    for name, row in known.items():
        base = row | {'order': compare['base']}
        if runs.arm_name(base) == name:
            base['pure'] = False
        others = [base]
        if row['order'] not in (compare['base'], compare['placebo']):
            others.append(row | {'order': compare['placebo']})
        for other in others:
            arms = [name, runs.arm_name(other)]
            named = runs.order_name(row) == compare['primary'][1] and other is base
            if arms[1] != name and arms[1] in known:
                found.append({'attention': row['attention'], 'arms': arms, 'named': named})
    return found

def paired(rows, arms, where, measure):
    """{seed: difference} of a measure between two arms at some positions, or of that at two: 'drope - kept'."""
    terms = []
    for sign, positions in zip((1, -1), where.split(' - ')):
        for flip, arm in zip((1, -1), arms):
            terms.append((sign * flip, rows.get(runs.condition(arm, positions), {})))
    found = {}
    for seed in sorted(set.intersection(*(set(of_seed) for _, of_seed in terms))):
        values = [value(of_seed[seed], measure) for _, of_seed in terms]
        if None not in values:
            found[seed] = sum(sign * x for (sign, _), x in zip(terms, values))
    return found

def effect(differences):
    """
    A paired difference, {seed: difference}, as mean with interval, p, and the least that such seeds would find.
    """
    d = list(differences.values())
    mean, low, high = t_interval(d) if d else (None, None, None)
    sds = smallest_effect(len(d))
    smallest = None if sds is None else sds * float(np.std(d, ddof=1))
    return {'mean': mean, 'low': low, 'high': high, 'n': len(d), 'p': sign_flip_p(d), 'p_adjusted': None,
            'smallest': smallest, 'differences': differences}

def effects(header, rows):
    """
    Paired differences between arms at the main recalibration length, a dict each: measure, attention, arms,
    where, mean, low, high, n, p, p_adjusted, smallest (what these seeds find four times in five), kind,
    differences {seed: number}. The p of the `primary` one stands alone; those of the `tested` family (MEASURES
    that are tested, at FAMILY, between the primary's arms) are adjusted together, for each attention type; all
    else is `explored`.
    """
    by_seed, found = {}, []
    for row in rows:
        if row['main']:
            by_seed.setdefault(row['condition'], {})[row['seed']] = row
    measures = [key for key, m in MEASURES.items() if m.tested]
    primary, _, at = header['compare']['primary']
    positions = sorted({row['positions'] for row in rows})
    wheres = ['drope - kept', *positions]
    for contrast, where, measure in itertools.product(contrasts(rows, header['compare']), wheres, measures):
        differences = paired(by_seed, contrast['arms'], where, measure)
        kind = 'explored'
        if contrast['named'] and (measure, where) == (primary, at):
            kind = 'primary'
        elif contrast['named'] and where in FAMILY:
            kind = 'tested'
        if differences:
            found.append(contrast | {'measure': measure, 'where': where, 'kind': kind} | effect(differences))
    for attention in {row['attention'] for row in rows}:
        adjust([e for e in found if e['kind'] == 'tested' and e['attention'] == attention])
    return found

def adjust(family):
    """
    Fill in p_adjusted of effects; a flip must flip the same seeds in all of them: those that every effect has.
    """
    common = set.intersection(*(set(e['differences']) for e in family)) if family else ()
    if common:
        d = [[e['differences'][seed] for e in family] for seed in common]                  # [n, m]
        for e, p in zip(family, max_t(d)):
            e['p_adjusted'] = p

# -----------------------------------------------------------------------------
# at equal loss: what an arm knows beside what it predicts

def matched(header, rows, measures=('score_p', 'probe')):
    """
    Differences between arms at equal validation loss, along the recalibration lengths of DroPE: dicts as of
    `effects`.

    For each seed a measure is interpolated in the loss above that seed's filter, inside the range where both
    arms have points and never beyond; its difference is averaged over the logarithm of the loss. Length 0, a
    model that never recovered, is left out. Where no seed's arms have a loss in common the mean is None and n
    is 0.
    """
    curves, found = {}, []                                  # curves: condition -> seed -> rows by rising loss
    for row in sorted(rows, key=loss_above):
        if row['positions'] == 'drope' and row['recal_steps'] and loss_above(row) > 0:
            curves.setdefault(row['condition'], {}).setdefault(row['seed'], []).append(row)
    for contrast, measure in itertools.product(contrasts(rows, header['compare']), measures):
        x, y = (curves.get(runs.condition(arm, 'drope'), {}) for arm in contrast['arms'])
        differences = {}
        for seed in sorted(x.keys() & y.keys()):
            d = at_equal_loss(x[seed], y[seed], measure)
            if d is not None:
                differences[seed] = d
        if y and max(map(len, x.values()), default=0) > 1:  # one length alone is no curve
            named = {'measure': measure, 'where': 'drope, equal loss', 'kind': 'explored'}
            found.append(contrast | named | effect(differences))
    return found

def at_equal_loss(x, y, measure):
    """
    The mean difference of a measure between two arms' curves where they have the same loss; None where nowhere.
    """
    low = max(loss_above(x[0]), loss_above(y[0]))
    high = min(loss_above(x[-1]), loss_above(y[-1]))
    if low >= high:
        return None
    grid = np.geomspace(low, high, 200)
    at = []
    for curve in (x, y):
        at.append(np.interp(grid, [loss_above(row) for row in curve], [value(row, measure) for row in curve]))
    return float(np.mean(at[0] - at[1]))

# -----------------------------------------------------------------------------
# tables, as Markdown lines

def number(values, form):
    """The mean of a sample and, of several, the half-width of its 95% interval; a dash where one is undefined."""
    if None in values or not values:
        return '—'
    mean, low, _ = t_interval(values)
    return format(mean, form) + ('' if low is None else ' ± ' + format(mean - low, form).lstrip('+'))

def table(headings, lines):
    """A Markdown table; nothing where there are no lines."""
    if not lines:
        return []
    rule = '|---' * len(headings) + '|'
    return ['| ' + ' | '.join(headings) + ' |', rule, *('| ' + ' | '.join(cells) + ' |' for cells in lines), '']

def by_length(rows):
    """Rows by what the tables call them: condition, and recalibration length unless it is the main one."""
    groups = {}
    for row in rows:
        name = row['condition'] if row['main'] else f'{row["condition"]}, {row["recal_steps"]} steps'
        groups.setdefault(name, []).append(row)
    return groups

def measures_table(rows, which):
    """A column for each measure of a table (`main` is the log's), with what chance gives beside its name."""
    keys = [key for key, m in MEASURES.items() if m.table == which]
    if all(value(row, key) is None for row in rows for key in keys):
        return []
    headings = ['Condition']
    for key in keys:
        m = MEASURES[key]
        levels = [x for x in (chance(row, key) for row in rows) if x is not None]
        name = m.heading + f'@L{middle(rows[0])}' * (key == 'probe')
        headings.append(f'{name} ({m.chance} {format(np.mean(levels), m.format)})' if levels else name)
    lines = []
    for name, group in by_length(rows).items():
        cells = [number([value(row, key) for row in group], MEASURES[key].format) for key in keys]
        lines.append([name, *cells, str(len(group))])
    return table([*headings, 'n'], lines)

def effects_table(found):
    """Paired differences: the primary ones, the tested family, then what is explored."""
    lines = []
    for e in sorted(found, key=lambda e: ('primary', 'tested', 'explored').index(e['kind'])):
        contrast = f'{" - ".join(e["arms"])}, {e["where"]}'
        interval = 'none' if e['low'] is None else f'[{e["low"]:+.4f}, {e["high"]:+.4f}]'
        lines.append([
            e['kind'], MEASURES[e['measure']].heading, contrast, runs.show(e['mean'], '+.4f'), interval,
            runs.show(e['smallest'], '.4f'), str(e['n']),
            runs.show(e['p'], '.3f'), runs.show(e['p_adjusted'], '.3f')])
    return table(['', 'Measure', 'Contrast', 'Difference', '95% interval', '80% power from', 'n', 'p (sign flip)',
                  'p (max-T)'], lines)

# -----------------------------------------------------------------------------
# the report

NOTES = """
Gap closed: from the topic-blind bigram to the Bayes filter. Within: attention on keys of the query's topic, over
queries with a choice; it is high for any local head. Within, all: over all queries, as in the log. P: topic or
contiguity, 0 for a head that knows positions alone. O: topic without contiguity, from other segments. A dash:
undefined, or not measured so.
"""
PROBE = """
After the last layer. Running mean: of the last 32 embeddings. Control task: a random label for each token type.
"""
CIRCUITS = """
Effective rank of the singular values of QK (at distance 0) and OV, mean over heads.
"""
EFFECTS = """
Primary, named beforehand: {primary}. {least} 80% power from: the smallest difference that this many seeds find four
times in five, at the spread seen. Max-T: adjusted over the tested family.
"""
MATCHED = """
Interpolated in the loss, along the recalibration lengths of DroPE but 0. A dash: no loss that both arms reach.
Explored: the p-values stand alone.
"""
ORDER = """
How much the step tells of a row's topic: 0 nothing (shuffled rows: what chance leaves), 1 everything.
"""

def section(title, text, lines):
    """A section of the report; nothing where there are no lines."""
    return [f'## {title}', text, *lines] if lines else []

def summary(header, rows, figures=()):
    """The text of summary.md: tables, what they are measured against, paired differences, figures."""
    n = len({row['seed'] for row in rows})
    measure, arm, where = header['compare']['primary']
    primary = f'{MEASURES[measure].heading}, {arm} - {header["compare"]["base"]}, {where}'
    spread, least = 'One seed: no interval.', 'One seed allows no test.'
    if n > 1:
        spread = f'{n} seeds; ±: half-width of the 95% t-interval over them.'
        least = f'The smallest p that {n} seeds can give is {2 / len(sign_flips(n)):.3g}.'
    of_seed = {row['seed']: row['references'] for row in rows}
    nats = []
    for name in rows[0]['references']:
        losses = [references[name] for references in of_seed.values()]
        nats.append(f'{name} {number(losses, ".4f")}')
    trained = [row for row in rows if row['recal_steps'] is None]
    differences, equal_loss = effects(header, rows), matched(header, rows)
    if not any(e['kind'] == 'primary' for e in differences):
        least = 'Its arms are not among these.'
    lines = [
        f'# {header["experiment"]}', '',
        f'{header["device"]}, torch {header["versions"]["torch"]}. {spread}', '',
        *measures_table(rows, 'main'),
        f'Reference losses in nats: {", ".join(nats)}.', NOTES,
        *section('The probe and its references', PROBE, measures_table(rows, 'probe')),
        *section('Circuits', CIRCUITS, measures_table(rows, 'circuits')),
        *section('Paired differences', EFFECTS.format(primary=primary, least=least), effects_table(differences)),
        *section('At equal loss', MATCHED, effects_table(equal_loss)),
        *section('Realised order', ORDER, measures_table(trained, 'order')),
        *section('Figures', '', [f'![{name}](figures/{name})\n' for name in figures])]
    return '\n'.join(lines) + '\n'

def write(folder):
    """Writes summary.md of an experiment folder; returns its name and the rows."""
    header, rows = runs.open_rows(folder)
    drawn = os.path.join(folder, 'figures')
    figures = sorted(os.listdir(drawn)) if os.path.isdir(drawn) else []
    path = os.path.join(folder, 'summary.md')
    runs.write_text(path, summary(header, rows, figures))
    return path, rows

def main(cfg):
    """Writes the report and prints its first table."""
    if len(cfg.paths) != 1:
        raise SystemExit('report.py takes an experiment folder: report.py out/demo')
    path, rows = write(cfg.paths[0])
    print('\n'.join(measures_table(rows, 'main')))
    print(f'report: {path}')

if __name__ == '__main__':
    command(main, __file__, positional=True)
