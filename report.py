"""
What finished runs allow to be said: statistics and tables, from the rows of an experiment alone.
Reads runs.jsonl of an experiment folder, or the row.json of its runs. Writes summary.md there.
    python report.py out/demo
    python report.py results/structured         # published rows are enough

A seed, one (data, initialisation) pair that all arms share, is the unit of every interval and test.
"""
import functools
import glob
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
    format: str             # of a number
    unit: str = ''          # of an axis, where a figure shows it
    chance: str = ''        # its level without structure, not 0: uniform (attention), init (weights), majority
    role: str = ''          # in paired differences: 'tested' (p-values adjusted together), 'explored'; '': not there
    table: str = 'main'     # the table that has it as a column
    since: int = 1          # the version of the measures that defines it so: older rows show a dash

MEASURES = {
    'val_loss': Measure('Val loss', '.4f', 'nats per token', role='tested'),
    'gap_closed': Measure('Gap closed', '.1%'),
    'within': Measure('Within', '.1%', 'share of attention', 'uniform', 'explored'),
    'within_all': Measure('Within, all', '.1%', chance='uniform'),
    'within_cross_ratio': Measure('Within / cross', '.2f', chance='uniform'),
    'entropy': Measure('Entropy', '.2f', 'nats', 'uniform', 'explored'),
    'entropy_last': Measure('Entropy, last layer', '.2f', 'nats', role='tested'),
    'entropy_within': Measure('Entropy within', '.2f', chance='uniform'),
    'entropy_cross': Measure('Entropy cross', '.2f', chance='uniform'),
    'probe': Measure('Probe, middle layer', '.1%', 'accuracy', 'majority', 'tested'),
    'score_p': Measure('P', '+.3f', 'log ratio', role='tested', since=2),
    'excess_mass': Measure('Excess mass', '+.2%', 'share of attention', role='tested'),
    'score_o': Measure('O', '+.3f', 'log ratio', role='tested'),
    'cka': Measure('ln(1 - CKA)', '+.3f', 'nats', role='explored', table=''),
    'profile': Measure('Profile of P', '+.3f', 'atanh r', role='explored', table=''),
    'probe.accuracy': Measure('Probe', '.1%', chance='majority', table='probe'),
    'probe.references.token': Measure('Token identity', '.1%', table='probe'),
    'probe.references.running_mean': Measure('Running mean', '.1%', table='probe'),
    'probe.references.untrained': Measure('Untrained', '.1%', table='probe'),
    'probe.references.control': Measure('Control task', '.1%', table='probe'),
    'probe.references.ceiling': Measure('Bayes filter', '.1%', table='probe'),
    'bigram.equal.score_p': Measure('P, equal bigrams', '+.3f', table='bigram'),
    'bigram.posterior.score_p': Measure('P, posterior', '+.3f', table='bigram'),
    'bigram.equal.score_o': Measure('O, equal bigrams', '+.3f', table='bigram'),
    'bigram.posterior.score_o': Measure('O, posterior', '+.3f', table='bigram'),
    'qk_rank': Measure('QK rank', '.1f', chance='init', table='circuits'),
    'ov_rank': Measure('OV rank', '.1f', chance='init', table='circuits'),
    'orderedness': Measure('Orderedness', '.3f', table='order'),
    'orderedness_by_token': Measure('Orderedness, by token', '.3f', table='order')}

FAMILY = ('rope', 'drope')          # the tested family: what order installs, and what of it is there after DroPE
PAIRS = ('cka', 'profile')          # of two runs: what differs is how alike they are
SHUFFLES = ('shuffled', 'reshuffled')       # exchangeable: their mean is the base

def names(rows, key):
    """The values of a key, once each, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))

def pick(rows, **wanted):
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

def part(row, path):
    """'probe.accuracy' of a row; None where something on the way is missing."""
    for key in path.split('.'):
        row = (row or {}).get(key)
    return row

def value(row, key):
    """A measure of a row, of a list by layer the last; None where it is undefined or was defined otherwise."""
    if row['measures_version'] < MEASURES[key].since:
        return None
    if key == 'probe':
        accuracy = part(row, 'probe.accuracy') or [None]    # of the embedding, after layer 1 ...
        return accuracy[(len(accuracy) - 1) // 2]
    if key == 'entropy_last':
        key = 'heads.entropy'                               # [L][H]
    found = part(row, key if '.' in key or key in row else f'mean.{key}')
    return float(np.mean(found[-1])) if isinstance(found, list) else found

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
    half = float(stats.t.ppf(0.975, len(x) - 1) * stats.sem(x))
    return mean, mean - half, mean + half

@functools.cache
def patterns(n, k, most=2 ** 16):
    """Choices of one of k for each of n seeds [.., n], the first all 0: every one or, of more, so many drawn."""
    if k ** n <= most:
        return np.array(list(itertools.product(range(k), repeat=n)))
    drawn = np.random.default_rng(0).integers(k, size=(most, n))
    drawn[0] = 0
    return drawn

def exchange_p(values):
    """Two-sided p of a mean over seeds, values [n, k]: a seed's number, then after exchanges that mean nothing."""
    if len(values) < 2:
        return None
    values = np.asarray(values)
    n, k = values.shape
    means = np.abs(values[np.arange(n), patterns(n, k)].mean(1))
    return float((means >= means[0] - 1e-12).mean())

def sign_flip_p(d):
    """Two-sided p of a paired difference d [n]: the share of sign flips with a mean as far from 0. None if n = 1."""
    return exchange_p([[x, -x] for x in d])

def fieller(x, y):
    """(ratio, low, high) of the means of x and y, {seed: number}: Fieller's (1954) 95% interval, None if unbounded."""
    d = np.array([(x[seed], y[seed]) for seed in x.keys() & y.keys()])          # [n, 2]
    n, mean = len(d), d.mean(0)
    if n < 2 or not mean[1]:
        return None, None, None
    reach = stats.f.ppf(0.95, 1, n - 1) / n * np.cov(d.T)                       # F is the square of t
    (c, b), (_, a) = np.outer(mean, mean) - reach                               # a rho^2 - 2 b rho + c <= 0
    low, high = sorted(np.roots([a, -2 * b, c]).real) if a > 0 else (None, None)
    return mean[0] / mean[1], low, high

def max_t(d):
    """
    Step-down max-|T| p-values [m] of m measures on n seeds, d [n, m]: a seed flips all its measures together,
    so their correlation is kept (Westfall & Young 1993, algorithm 4.1; Romano & Wolf 2005). None if n = 1.
    """
    d = np.asarray(d, float)
    n, m = d.shape
    if n < 2:
        return [None] * m
    flipped = (1 - 2 * patterns(n, 2)) @ d / n                                  # [flips, m] means
    sd = np.sqrt(np.maximum((d ** 2).mean(0) - flipped ** 2, 1e-30))            # flips keep the squares
    T = np.abs(flipped) / sd
    order = np.argsort(-T[0])                                                   # the first row flips nothing
    later = T[:, order[::-1]]
    top = np.maximum.accumulate(later, axis=1)[:, ::-1]                         # of the measures not yet rejected
    p = np.maximum.accumulate((top >= top[0] * (1 - 1e-9)).mean(0))
    return p[np.argsort(order)].tolist()

# what 80% of samples of n seeds show at 5%, in SDs: bisection, 200,000 normal samples for each n
SMALLEST = {6: 1.79, 7: 1.33, 8: 1.19, 9: 1.09, 10: 1.00}

def smallest_effect(n):
    """The mean, in SDs, that sign flips find in 80% of samples of n; None below 6 seeds, where no p is that small."""
    return SMALLEST.get(n, 2.8 / (n - 2) ** 0.5) if n > 5 else None             # formula: 1% off at 11 to 16

# -----------------------------------------------------------------------------
# what is compared with what

def against(row, compare):
    """
    What an arm is compared with: lists of what names arms, whose mean is subtracted. The base in windows of its kind
    (pure windows of the base: mixed ones), and the placebo in the same passes; a rerun with what it repeats.
    """
    plain = row | {'repeat': 0}
    if row['repeat']:
        return [[plain]]
    shuffles = SHUFFLES if compare['base'] in SHUFFLES else (compare['base'],)
    base = [plain | {'order': order, 'cycles': 1, 'cooldown': 0.0} for order in shuffles]
    if row['order'] == compare['base']:
        return [[other | {'pure': False} for other in base]] if row['pure'] else []
    if row['order'] in shuffles:
        return [base]
    return [base, [plain | {'order': compare['placebo']}]]

def contrasts(rows, compare):
    """Dicts of what is compared: attention, order, arms (one, then those whose mean is subtracted), label, named."""
    found = []
    known = {runs.arm_name(row): row for row in rows}
    for name, row in known.items():
        named = runs.order_name(row) == compare['primary'][1]
        for others in against(row, compare):
            arms = [arm for arm in map(runs.arm_name, others) if arm in known and arm != name]
            if arms:
                label = f'{name} - {"base" if len(arms) > 1 else arms[0]}'
                found.append({'attention': row['attention'], 'order': row['order'], 'arms': [name, *arms],
                              'label': label, 'named': named})
            named = False                                   # that is with the base
    return found

def alike(x, y, measure):
    """How alike two runs are: -ln(1 - CKA), or atanh r over heads of their P, centred by layer; NaN if undefined."""
    if measure == 'cka':
        cka = part(x, f'cka.{y["condition"]}') or part(y, f'cka.{x["condition"]}')
        return -np.log(1 - cka) if cka else np.nan
    P = np.array([part(x, 'heads.score_p'), part(y, 'heads.score_p')], float)           # [2, L, H]
    P -= P.mean(2, keepdims=True)
    return np.arctanh(np.corrcoef(P.reshape(2, -1))[0, 1])

def numbers(curves, measure):
    """A number for each arm of a seed, curves [arm][length]; of PAIRS how alike the other two of three arms are."""
    rows = [curve[0] for curve in curves]
    if measure not in PAIRS:
        return [value(row, measure) for row in rows]
    return [alike(x, y, measure) for x, y in itertools.combinations(rows, 2)][::-1]

def at_equal_loss(curves, measure):
    """The same, mean over the losses that all arms reach: interpolated, never extrapolated (NaN)."""
    at = []
    low = max(min(map(loss_above, curve)) for curve in curves)
    high = min(max(map(loss_above, curve)) for curve in curves)
    grid = np.linspace(low, high, 200)                      # an arm that does not reach `low` is NaN there
    for curve in curves:
        rising = sorted(curve, key=loss_above)
        y = np.array([value(row, measure) for row in rising], float)
        at.append(np.interp(grid, [loss_above(row) for row in rising], y, right=np.nan).mean())
    return at

def compared(rows, contrast, where, measure, numbers=numbers):
    """
    The effect of a contrast at some positions: an arm's number minus the mean of the others, over seeds. Its p: by sign
    flips; of PAIRS by exchanging the three names, any of which could be the arm's.
    """
    conditions = [runs.condition(arm, where) for arm in contrast['arms']]
    seeds, values = [], []
    for seed in names(rows, 'seed'):
        own, *others = (pick(rows, condition=name, seed=seed) for name in conditions)
        curves = [own, *filter(None, others)]               # one shuffle will do, for pairs two are needed
        if own and len(curves) > 1 + (measure in PAIRS):
            x = np.array(numbers(curves, measure), float)
            d, *renamed = (len(x) * x - x.sum()) / (len(x) - 1)         # each minus the mean of the others
            if np.isfinite(d):
                seeds.append(seed)                          # sorted: no shuffle is the first
                values.append([d, *sorted(renamed)])
    d = [float(x[0]) for x in values]
    mean, low, high = t_interval(d) if d else (None, None, None)
    sds = smallest_effect(len(d))
    e = contrast | {
        'label': f'{contrast["label"]}, {where}',
        'where': where,
        'measure': measure,
        'kind': 'explored',
        'mean': mean,
        'low': low,
        'high': high,
        'n': len(d),
        'p': exchange_p(values) if measure in PAIRS else sign_flip_p(d),
        'p_adjusted': None,
        'smallest': sds and sds * float(np.std(d, ddof=1)),
        'note': '',
        'differences': dict(zip(seeds, d))}
    if measure == 'profile' and d:
        r = np.mean([part(row, 'reliability') or 0 for row in rows if row['condition'] in conditions])
        read(e, r >= 0.8, f'reliability {r:.2f}')
    return e

def read(e, holds, why):
    """An effect is read where something else holds; elsewhere it has no p."""
    e['note'] = f'; {why}' + ('' if holds else ': nothing is concluded')
    e['p'] = e['p'] if holds else None

def effects(header, rows):
    """Paired differences at the main length, `compared`; kind: primary, tested (p adjusted together) or explored."""
    main, found = pick(rows, main=True), []
    primary, _, at = header['compare']['primary']
    measures = [key for key, m in MEASURES.items() if m.role]
    wanted = itertools.product(contrasts(rows, header['compare']), names(rows, 'positions'), measures)
    for contrast, where, measure in wanted:
        e = compared(main, contrast, where, measure)
        if contrast['named'] and where in FAMILY:
            e['kind'] = MEASURES[measure].role
        if contrast['named'] and (measure, where) == (primary, at):
            e['kind'] = 'primary'
            if at == 'drope' and measure not in PAIRS:
                kept = compared(main, contrast, 'kept', measure)
                read(e, (kept['p'] or 1) <= 0.05, f'kept: p {runs.show(kept["p"], ".2g")}')
        if e['n']:
            found.append(e)
    for attention in names(found, 'attention'):
        adjust(pick(found, kind='tested', attention=attention))
    return found

def adjust(family):
    """Fill in p_adjusted of effects; a flip flips the same seeds in all of them: those that every effect has."""
    common = set.intersection(*(set(e['differences']) for e in family)) if family else ()
    if common:
        d = [[e['differences'][seed] for e in family] for seed in common]                  # [n, m]
        for e, p in zip(family, max_t(d)):
            e['p_adjusted'] = p

def course(header, rows):
    """The primary measure by recalibration length: a contrast, steps, effects rope, kept and drope, Fieller's ratio."""
    found = []
    measure = header['compare']['primary'][0]
    lengths = sorted(filter(None, names(rows, 'recal_steps')))
    for contrast, steps in itertools.product(contrasts(rows, header['compare']), lengths):
        at = pick(rows, recal_steps=None) + pick(rows, recal_steps=steps)
        rope, kept, drope = (compared(at, contrast, where, measure) for where in ('rope', 'kept', 'drope'))
        if kept['n'] and drope['n']:
            ratio = fieller(drope['differences'], kept['differences'])
            found.append(contrast | {'steps': steps, 'rope': rope, 'kept': kept, 'drope': drope, 'ratio': ratio})
    return found

def matched(header, rows, measures=('score_p', 'probe')):
    """Differences after DroPE at equal loss, as `effects`; n is 0 where no seed has a loss that all arms reach."""
    rows = [row for row in rows if row['recal_steps']]      # length 0 never recovered
    if all(row['main'] for row in rows):                    # one length is no curve
        return []
    wanted = itertools.product(contrasts(rows, header['compare']), measures)
    return [compared(rows, contrast, 'drope', measure, at_equal_loss) for contrast, measure in wanted]

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

def measures_table(rows, which):
    """A column for each measure of a table (`main` is the log's), with what chance gives beside its name."""
    keys = [key for key, m in MEASURES.items() if m.table == which]
    if all(value(row, key) is None for row in rows for key in keys):
        return []
    headings = ['Condition']
    for key in keys:
        m = MEASURES[key]
        path = 'probe.references.majority' if m.chance == 'majority' else f'uniform.{key}'
        levels = [x for x in (part(row, path) for row in rows) if x is not None]
        level = f' ({m.chance} {format(np.mean(levels), m.format)})' if m.chance and levels else ''
        headings.append(m.heading + level)
    lines, groups = [], {}
    for row in rows:
        length = '' if row['main'] else f', {row["recal_steps"]} steps'
        groups.setdefault(row['condition'] + length, []).append(row)
    for name, group in groups.items():
        cells = [number([value(row, key) for row in group], MEASURES[key].format) for key in keys]
        lines.append([name, *cells, str(len(group))])
    return table([*headings, 'n'], lines)

def effects_table(found):
    """Paired differences: the primary ones, the tested family, then what is explored."""
    lines = []
    for e in sorted(found, key=lambda e: ('primary', 'tested', 'explored').index(e['kind'])):
        lines.append([
            e['kind'], MEASURES[e['measure']].heading, e['label'] + e['note'],
            number(list(e['differences'].values()), '+.4f'), runs.show(e['smallest'], '.4f'), str(e['n']),
            runs.show(e['p'], '.2g'), runs.show(e['p_adjusted'], '.2g')])
    return table(['', 'Measure', 'Contrast', 'Difference', '80% power from', 'n', 'p', 'p (max-T)'], lines)

def course_table(found):
    """The primary measure by recalibration length: the difference with RoPE kept and what is left without."""
    lines = []
    for c in found:
        cells = [c['label'], str(c['steps'])]
        for e in (c['kept'], c['drope']):
            difference = number(list(e['differences'].values()), '+.4f')
            cells.append(f'{difference}, p {runs.show(e["p"], ".2g")}{e["note"]}')
        ratio, low, high = c['ratio']
        between = 'unbounded' if low is None else f'[{low:+.2f}, {high:+.2f}]'
        lines.append([*cells, runs.show(ratio, '+.2f'), between, str(c['drope']['n'])])
    return table(['Contrast', 'Steps', 'Kept', 'DroPE', 'DroPE / kept', '95% interval', 'n'], lines)

NOTES = """Gap closed: from the topic-blind bigram to the Bayes filter. Within: attention on keys of the query's topic,
over queries with a choice; it is high for any local head. Within, all: over all queries, as in the log. P: topic or
contiguity, 0 for a head that knows positions alone; excess mass: how much attention that is. O: topic without
contiguity, from other segments. Middle layer: n_layer // 2. A dash: undefined, or not measured so."""
PROBE = 'After the last layer. Running mean: of 32 embeddings. Control task: a random label for each token type.'
BIGRAM = """P and O of attention to keys with the query's bigram, and of the topic's posterior from a bigram at each
end. A head above both knows more than two neighbouring tokens tell."""
CIRCUITS = 'Effective rank of the singular values of QK (at distance 0) and OV, mean over heads.'
EFFECTS = """Primary, named beforehand: {primary}; after DroPE it is read only if p <= .05 with RoPE kept.

Base: the mean of a seed's shuffled and reshuffled arms, or the one that is there. p: two-sided, by sign flips of seeds.
ln(1 - CKA) and Profile of P (atanh r over heads, centred by layer; read from a split-half reliability of 0.8 on): how
much less alike an arm is to the two shuffles than they are to one another; p: by exchanging the three names within each
seed. Exact up to 65,536 patterns (16 seeds, 10 of three names), of more so many drawn. 80% power from: what so many
seeds find by sign flips four times in five, at this spread. Max-T: over the tested family."""
COURSE = """The primary measure with RoPE kept and dropped. Ratio: of the means, with Fieller's interval; unbounded:
kept may be 0, or there is one seed."""
MATCHED = """Mean over the losses that all arms of a contrast reach in a seed: interpolated along the recalibration
lengths but 0, never beyond. A dash: there are none. Explored: the p-values stand alone."""
ORDER = 'How much the step tells of a topic: 0 nothing (shuffled rows: what chance leaves), 1 everything.'

def section(title, text, lines):
    """A section of the report; nothing where there are no lines."""
    return [f'## {title}', '', text, '', *lines] if lines else []

def summary(header, rows, figures=()):
    """The text of summary.md: tables, what they are measured against, paired differences, figures."""
    measure, arm, where = header['compare']['primary']
    primary = f'{MEASURES[measure].heading}, {arm} - base, {where}'
    nats = []
    for name in rows[0]['references']:
        losses = {row['seed']: row['references'][name] for row in rows}
        nats.append(f'{name} {number(list(losses.values()), ".4f")}')
    trained = pick(rows, recal_steps=None)
    lines = [
        f'# {header["experiment"]}', '',
        f'{header["device"]}, torch {header["versions"]["torch"]}. n: seeds; ±: half-width of the 95% t-interval over '
        'them, of one seed none.', '',
        *measures_table(rows, 'main'),
        f'Reference losses in nats: {", ".join(nats)}.', '', NOTES, '',
        *section('The probe and its references', PROBE, measures_table(rows, 'probe')),
        *section('Bigram references', BIGRAM, measures_table(trained, 'bigram')),
        *section('Circuits', CIRCUITS, measures_table(rows, 'circuits')),
        *section('Paired differences', EFFECTS.format(primary=primary), effects_table(effects(header, rows))),
        *section('The course', COURSE, course_table(course(header, rows))),
        *section('At equal loss', MATCHED, effects_table(matched(header, rows))),
        *section('Realised order', ORDER, measures_table(trained, 'order')),
        *section('Figures', '', [f'![{name}](figures/{name})\n' for name in figures])]
    return '\n'.join(lines) + '\n'

def write(folder):
    """Writes summary.md of an experiment folder; returns its name and the rows."""
    header, rows = runs.open_rows(folder)
    figures = sorted(glob.glob('*.png', root_dir=os.path.join(folder, 'figures')))
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
