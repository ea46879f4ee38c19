"""
What finished runs allow to be said: statistics and tables, from the rows of an experiment alone.
Reads runs.jsonl of an experiment folder, or the row.json of its runs. Writes summary.md there.
    python report.py out/demo
    python report.py results/structured         # published rows are enough
A seed, one (data, initialisation) pair that all arms share, is the unit of every interval and test.
"""
import glob
from itertools import combinations, product
from operator import itemgetter
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
    chance: str = ''        # where a row has its level without structure, if that is not 0
    role: str = ''          # in paired differences: 'tested' (p-values adjusted together), 'explored'; '': not there
    since: int = 1          # the version of the measures that defines it so: older rows show a dash

MEASURES = {
    'val_loss': Measure('Val loss', '.4f', 'nats per token', 'references.bigram', 'tested'),
    'gap_closed': Measure('Gap closed', '.1%'),
    'within': Measure('Within', '.1%', 'share of attention', 'uniform.within', 'explored'),
    'within_all': Measure('Within, all', '.1%', chance='uniform.within_all'),
    'within_cross_ratio': Measure('Within / cross', '.2f', chance='uniform.within_cross_ratio'),
    'entropy': Measure('Entropy', '.2f', 'nats', 'uniform.entropy', 'explored'),
    'entropy_last': Measure('Entropy, last layer', '.2f', 'nats', 'uniform.entropy', 'tested'),
    'entropy_within': Measure('Entropy within', '.2f', chance='uniform.entropy_within'),
    'entropy_cross': Measure('Entropy cross', '.2f', chance='uniform.entropy_cross'),
    'probe': Measure('Probe, middle layer', '.1%', 'accuracy', 'probe.references.majority', 'tested'),
    'score_p': Measure('P', '+.3f', 'log ratio', role='tested', since=2),
    'best_p': Measure('P, best head', '+.3f', chance='unknown', since=2),    # noise makes the best of many positive
    'reliability': Measure('Reliability of P', '.2f'),
    'excess_mass': Measure('Excess mass', '+.2%', 'share of attention', role='tested'),
    'score_o': Measure('O', '+.3f', 'log ratio', role='tested'),
    'cka': Measure('ln(1 - CKA)', '+.3f', 'nats', role='explored'),
    'profile': Measure('Profile of P', '+.3f', 'atanh r', role='explored')}

OUTCOMES = [key for key, m in MEASURES.items() if m.role]       # which have paired differences
FAMILY = ('rope', 'drope')          # the tested family: what order installs, and what of it is there after DroPE
PAIRS = ('cka', 'profile')          # of two runs: what differs is how alike they are
SHUFFLES = ('shuffled', 'reshuffled')       # exchangeable: their mean is the base
SHORT = ('val_loss', 'within', 'entropy', 'probe', 'score_p')   # the log's table

def grouped(rows, key):
    """{value of a key: the rows that have it}, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found

def pick(rows, **wanted):
    """The rows with these values."""
    return [row for row in rows if wanted.items() <= row.items()]

def part(row, path):
    """'probe.accuracy' of a row; None where something on the way is missing."""
    for key in path.split('.'):
        row = (row or {}).get(key)
    return row

def value(row, key):
    """A measure of a row, or what is at a path, of a list by layer the last; None where it is undefined."""
    if key in MEASURES and row['measures_version'] < MEASURES[key].since:
        return None                                         # it was defined otherwise
    path = {'probe': 'probe.accuracy', 'best_p': 'heads.score_p', 'entropy_last': 'heads.entropy'}.get(key, key)
    found = part(row, path if '.' in path or path in row else f'mean.{path}')
    if key == 'best_p':
        return runs.plain(np.fmax.reduce(np.ravel(found).astype(float)))        # passes over what is undefined
    if key == 'probe' and found:                            # of the embedding, after layer 1 ...
        return found[(len(found) - 1) // 2]
    return float(np.mean(found[-1])) if isinstance(found, list) else found

# -----------------------------------------------------------------------------
# tests on paired differences

def t_interval(x):
    """(mean, low, high): the 95% t-interval of a sample; low and high None for a sample of one, all of an empty one."""
    n = len(x)
    mean = np.mean(x) if n else None
    if n < 2:
        return mean, None, None
    half = stats.t.ppf(0.975, n - 1) * stats.sem(x)
    return mean, mean - half, mean + half

def patterns(n, k, most=2 ** 16):
    """Choices of one of k for each of n seeds [.., n], the first all 0: every one or, of more, so many drawn."""
    if k ** n <= most:
        return np.indices((k,) * n).reshape(n, -1).T
    drawn = np.random.default_rng(0).integers(k, size=(most, n))
    drawn[0] = 0
    return drawn

def exchange_p(values):
    """Two-sided p of a mean over seeds, values [n, k]: a number, then after exchanges that mean nothing; None if 1."""
    if len(values) < 2:
        return None
    values = np.asarray(values)
    n, k = values.shape
    means = np.abs(values[np.arange(n), patterns(n, k)].mean(1))
    return (means >= means[0] - 1e-12).mean()

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
    """Step-down max-|T| p-values [m], d [n, m]: a seed flips all m measures (Westfall & Young 1993, algorithm 4.1)."""
    flips = 1 - 2 * patterns(len(d), 2)                     # [flips, n], the first flips nothing
    norm = np.linalg.norm(d, axis=0)                        # flips keep it, so T rises with |t|
    T = np.abs(flips @ d) / np.maximum(norm, 1e-30)         # [flips, m]
    p = np.zeros_like(T[0])
    order = np.argsort(-T[0])
    for i, measure in enumerate(order):
        top = T[:, order[i:]].max(1)                                            # of the measures not yet rejected
        p[measure] = max(p.max(), (top >= T[0, measure] * (1 - 1e-9)).mean())
    return p

# what sign flips find at 5% in 80% of samples of n seeds, in SDs: 200,000 normal samples each; the roots are 2% off
SMALLEST = {6: 1.79, 7: 1.33, 8: 1.19, 9: 1.09, 10: 1.00}

def smallest_effect(d, names=2):
    """What sign flips, or exchanges of three names, find in 80% of samples of this size and spread; None below 6."""
    n = len(d)
    if n > 5:
        found = 2.8 / (n - 1) ** 0.5 if names == 3 else SMALLEST.get(n, 2.8 / (n - 2) ** 0.5)
        return found * np.std(d, ddof=1)

# -----------------------------------------------------------------------------
# what is compared with what

def against(row, compare):
    """What an arm is compared with: lists of arms, whose mean is subtracted. The base in windows of its kind (pure
    windows of the base: mixed ones), and the placebo in the same passes; a rerun with what it repeats."""
    if row['repeat']:
        return [[row | {'repeat': 0}]]
    shuffles = SHUFFLES if compare['base'] in SHUFFLES else (compare['base'],)
    base = [row | {'order': order, 'cycles': 1, 'cooldown': 0.0} for order in shuffles]
    if row['order'] == compare['base']:
        return [[other | {'pure': False} for other in base]] if row['pure'] else []
    return [base] if row['order'] in shuffles else [base, [row | {'order': compare['placebo']}]]

def contrasts(rows, compare):
    """Dicts of what is compared: attention, control, arms (one, then those whose mean is subtracted), label, named."""
    found = []
    known = {runs.arm_name(row): row for row in rows}
    for name, row in known.items():
        named = runs.order_name(row) == compare['primary'][1]
        for others in against(row, compare):
            arms = [arm for arm in map(runs.arm_name, others) if arm in known and arm != name]
            if arms:
                found.append({
                    'attention': row['attention'],
                    'control': row['order'] in (compare['placebo'], SHUFFLES[1]),
                    'arms': [name, *arms],
                    'label': f'{name} - {"base" if len(arms) > 1 else arms[0]}',
                    'named': named})
            named = False                                   # that is with the base
    return found

def alike(x, y, measure):
    """How alike two runs are: -ln(1 - CKA), or atanh r over heads of their P, centred by layer; NaN if undefined."""
    if measure == 'cka':
        cka = part(x, f'cka.{y["condition"]}') or part(y, f'cka.{x["condition"]}')
        return -np.log(1 - cka) if cka else np.nan
    profiles = [part(row, 'heads.score_p') for row in (x, y)]
    if None in profiles:                                    # not analysed yet
        return np.nan
    P = np.array(profiles, float)                           # [2, L, H]
    P -= P.mean(2, keepdims=True)
    return np.arctanh(np.corrcoef(P.reshape(2, -1))[0, 1])

def numbers(curves, measure):
    """A number for each arm of a seed, curves [arm][length]; of PAIRS how alike the other two of three arms are."""
    rows = [curve[0] for curve in curves]
    if measure not in PAIRS:
        return [value(row, measure) for row in rows]
    return [alike(x, y, measure) for x, y in combinations(rows, 2)][::-1]

def at_equal_loss(curves, measure):
    """The same, mean over the losses that all arms reach: interpolated, never extrapolated (NaN)."""
    lines = []
    for curve in curves:
        points = [(row['val_loss'], value(row, measure)) for row in curve]
        lines.append(np.array(sorted(points), float).T)     # [2, lengths], the losses rising
    # from the lowest loss that all reach: an arm that does not is NaN there
    grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
    return [np.interp(grid, x, y, right=np.nan).mean() for x, y in lines]

def compared(rows, contrast, where, measure, numbers=numbers):
    """The effect of a contrast at some positions: an arm's number minus the mean of the others, over seeds. Its p: by
    sign flips; of PAIRS by exchanging the three names, any of which could be the arm's."""
    conditions = [runs.condition(arm, where) for arm in contrast['arms']]
    found = {}                                              # seed -> the difference, and after exchanges
    for seed, of_seed in grouped(rows, 'seed').items():
        known = grouped(of_seed, 'condition')
        curves = [known[name] for name in conditions if name in known]
        # one shuffle will do, for pairs two are needed
        if conditions[0] in known and len(curves) > 1 + (measure in PAIRS):
            x = np.array(numbers(curves, measure), float)
            d, *renamed = x - (x.sum() - x) / (len(x) - 1)  # each minus the mean of the others
            if np.isfinite(d):                              # sorted: no shuffle is the first
                found[seed] = [d, *sorted(renamed)] if measure in PAIRS else [d, -d]
    d = [x[0] for x in found.values()]
    mean, low, high = t_interval(d)
    return contrast | {
        'label': f'{contrast["label"]}, {where}',
        'where': where,
        'conditions': conditions,
        'measure': measure,
        'kind': 'explored',
        'differences': dict(zip(found, d)),
        'text': number(d, '+.4f'),
        'n': len(d),
        'mean': mean,
        'low': low,
        'high': high,
        'p': exchange_p(list(found.values())),
        'p_adjusted': None,
        'smallest': smallest_effect(d, 3 if measure in PAIRS else 2)}

def effects(header, rows):
    """Paired differences at the main length, `compared`, but unreliable profiles; kind: primary, tested, explored."""
    rows, found = pick(rows, main=True), []
    primary, _, at = header['compare']['primary']
    for contrast, where, measure in product(
            contrasts(rows, header['compare']), grouped(rows, 'positions'), OUTCOMES):
        e = compared(rows, contrast, where, measure)
        if e['named'] and where in FAMILY:
            e['kind'] = MEASURES[measure].role
        if e['named'] and (measure, where) == (primary, at):
            e['kind'] = 'primary'
            gate(e, compared(rows, contrast, 'kept', measure))
        if e['n'] and (measure != 'profile' or reliability(rows, e) >= 0.8):
            found.append(e)
    for family in grouped(pick(found, kind='tested'), 'attention').values():
        common = set.intersection(*(set(e['differences']) for e in family))
        if len(common) > 1:                                 # a flip flips the same seeds in all of them
            d = [[e['differences'][seed] for e in family] for seed in common]              # [n, m]
            for e, p in zip(family, max_t(d)):
                e['p_adjusted'] = p
    return found

def gate(e, kept):
    """The primary contrast has a p after DroPE only where RoPE kept shows it; of PAIRS it has one always."""
    if e['named'] and e['where'] == 'drope' and e['measure'] not in PAIRS and (kept['p'] or 1) > 0.05:
        e['p'] = None

def reliability(rows, e):
    """Of the profiles of P that an effect compares: of odd with even rows, mean over runs."""
    return np.mean([part(row, 'reliability') or 0 for row in rows if row['condition'] in e['conditions']])

def course(header, rows):
    """The primary measure by recalibration length: a contrast, steps, effects rope, kept and drope, Fieller's ratio."""
    found = []
    measure = header['compare']['primary'][0]
    for contrast, steps in product(contrasts(rows, header['compare']), grouped(rows, 'recal_steps')):
        at = pick(rows, recal_steps=None) + pick(rows, recal_steps=steps)
        rope, kept, drope = (compared(at, contrast, where, measure) for where in ('rope', 'kept', 'drope'))
        if kept['n'] and drope['n']:
            gate(drope, kept)
            found.append(contrast | {
                'steps': steps,
                'rope': rope,
                'kept': kept,
                'drope': drope,
                'ratio': fieller(drope['differences'], kept['differences'])})
    return found

def matched(header, rows):
    """Differences after DroPE at equal loss, as `effects`; n is 0 where no seed has a loss that all arms reach."""
    rows = [row for row in rows if row['recal_steps']]      # length 0 never recovered
    if all(row['main'] for row in rows):                    # one length is no curve
        return []
    return [compared(rows, contrast, 'drope', measure, at_equal_loss)
            for contrast, measure in product(contrasts(rows, header['compare']), ('score_p', 'probe'))]

# -----------------------------------------------------------------------------
# tables, as Markdown lines, and the report

def table(headings, lines):
    """A Markdown table, its columns aligned; nothing where there are no lines."""
    widths = [max(map(len, column)) for column in zip(headings, *lines)]
    rule = ['-' * width for width in widths]
    padded = [map(str.ljust, cells, widths) for cells in (headings, rule, *lines)]
    return [f'| {" | ".join(cells)} |' for cells in padded] + [''] if lines else []

def number(values, form):
    """The mean of a sample and, of several, the half-width of its 95% interval; a dash where one is undefined."""
    if None in values or not values:
        return '—'
    mean, low, _ = t_interval(values)
    if low is None:
        return format(mean, form)
    return f'{mean:{form}} ± {mean - low:{form.lstrip("+")}}'

def chance(rows, key):
    """What a measure is without structure, mean over rows."""
    path = MEASURES[key].chance
    levels = [part(row, path) if path else 0 for row in rows]
    return runs.show(None if None in levels else np.mean(levels), MEASURES[key].format)

def chance_lines(rows, columns):
    """A line of the table; one for each kind of positions where these differ in it, as with a window."""
    levels = {}
    for positions, trained in grouped(pick(rows, recal_steps=None) or rows, 'positions').items():
        levels.setdefault(tuple(chance(trained, key) for key in columns), positions)
    return [['chance' + f', {positions}' * (len(levels) > 1), *cells, ''] for cells, positions in levels.items()]

def rows_table(rows, columns, form=''):
    """A column for each of {key: heading}, a line for each condition and length of which something is known."""
    rows = [row | {'label': row['condition'] + f', {row["recal_steps"]} steps' * (not row['main'])}
            for row in rows]
    lines = [] if form else chance_lines(rows, columns)
    for name, group in grouped(rows, 'label').items():
        cells = [number([value(row, key) for row in group], form or MEASURES[key].format) for key in columns]
        if not form or set(cells) != {'—'}:                 # all measures may be stale
            lines.append([name, *cells, str(len(group))])
    return table(['Condition', *columns.values(), 'n'], lines)

def tested(e):
    """An effect as text, with what is known of it."""
    text = e['text']
    for key, form in {'n': '', 'p': '.2g', 'p_adjusted': '.2g', 'smallest': '.4f'}.items():
        if e[key] is not None:
            text += f', {key} {e[key]:{form}}'
    return f'**{text}**' if e['kind'] == 'primary' else text

def effects_table(found, keys, text=tested):
    """A line for each contrast at some positions, a column for each measure."""
    lines = []
    for label, of_label in grouped(found, 'label').items():
        cells = {e['measure']: text(e) for e in of_label}
        lines.append([label, *(cells.get(key, '—') for key in keys)])
    return table(['Difference', *(MEASURES[key].heading for key in keys)], lines)

def course_table(found):
    """The primary measure by recalibration length: the difference with RoPE kept and what is left without."""
    lines = []
    for c in found:
        ratio = [runs.show(x, '+.2f') for x in c['ratio']]
        lines.append([c['label'], str(c['steps']), tested(c['kept']), tested(c['drope']), *ratio])
    return table(['Difference', 'Steps', 'Kept', 'DroPE', 'DroPE / kept', 'from', 'to'], lines)

MAIN = """## All measures

Chance: the topic-blind bigram (loss), uniform attention, the most frequent topic (probe). Gap closed: from that bigram
to the Bayes filter. Within: attention on keys of the query's topic, over queries with a choice (all: over all, as in
the log); high for any local head. P: topic or contiguity, 0 for a head that knows positions alone; reliability: of its
profile, odd with even rows; excess mass: how much attention P is. O: topic without contiguity, from other segments.
Middle layer: n_layer // 2. A dash: undefined.
"""
ONE_SEED = """One seed shows what all arms share, such as what becomes of P after DroPE; a difference between two arms
may be chance, and has no interval (--seeds=0,1) and no p (below .05 only from 6 seeds on)."""
SEVERAL = '±: half-width of the 95% t-interval over n seeds. Tests: below, in summary.md; n under 6 has no p below .05.'
EFFECTS = """## Paired differences

**Primary**, named beforehand: {primary}; after DroPE it has a p only where p <= .05 with RoPE kept, profiles always.
Base: mean of a seed's shuffled and reshuffled arms, or the one there is. n: seeds. p: two-sided, by sign flips of them.
ln(1 - CKA) and Profile of P (atanh r over heads, centred by layer; from a reliability of 0.8 on): how much less alike
an arm is to the shuffles than they are to one another; p: by exchanging the three names. Exact up to 65,536 patterns,
else drawn. p_adjusted: max-T over the tested family. smallest: what is found four times in five, at n and spread."""
COURSE = """## The course

The primary measure with RoPE kept and dropped. Ratio: of the means, with Fieller's interval; a dash: unbounded."""
MATCHED = """## At equal loss

Mean over the losses that all arms of a contrast reach in a seed, interpolated along the lengths. A dash: none."""

# further tables: (heading and text, of trained runs alone, format, {path in a row: heading})
FURTHER = (
    ('## Reference losses, in nats', True, '.4f', {
        'references.uniform': 'Uniform', 'references.bigram': 'Topic-blind bigram',
        'references.filter': 'Bayes filter', 'references.oracle': 'Oracle'}),
    ("""## Bigram references

P and O of attention to keys with the query's bigram, and of the posterior of a bigram at each end.""", True, '+.3f', {
        'bigram.equal.score_p': 'P, equal bigrams', 'bigram.posterior.score_p': 'P, posterior',
        'bigram.equal.score_o': 'O, equal bigrams', 'bigram.posterior.score_o': 'O, posterior'}),
    ("""## Realised order

How much the step tells of a topic: 0 nothing (shuffled rows: what chance leaves), 1 everything.""", True, '.3f', {
        'orderedness': 'Orderedness', 'orderedness_by_token': 'Orderedness, by token'}),
    ("""## The probe and its references

After the last layer. Running mean: of 32 embeddings. Control task: a random label a token type.""", False, '.1%', {
        'probe.accuracy': 'Probe', 'probe.references.majority': 'Majority',
        'probe.references.token': 'Token identity', 'probe.references.running_mean': 'Running mean',
        'probe.references.untrained': 'Untrained', 'probe.references.control': 'Control task',
        'probe.references.ceiling': 'Bayes filter'}),
    ("""## Circuits

Effective rank of the singular values of QK (at distance 0) and OV, mean over heads.""", False, '.1f', {
        'mean.qk_rank': 'QK rank', 'uniform.qk_rank': 'at initialisation',
        'mean.ov_rank': 'OV rank', 'uniform.ov_rank': 'at initialisation'}))

def section(text, lines):
    return [text, '', *lines] if lines else []

def summary(header, rows, figures=()):
    """The text of summary.md: what matters most, then every table and the figures."""
    measure, arm, where = header['compare']['primary']
    primary = f'{MEASURES[measure].heading}, {arm} - base, {where}'
    found = effects(header, rows)
    headings = {key: m.heading for key, m in MEASURES.items() if key not in PAIRS}
    lines = [
        f'# {header["experiment"]}\n',
        f'{header["device"]}, torch {header["versions"]["torch"]}.\n',
        *rows_table(pick(rows, main=True), {key: headings[key] for key in (*SHORT, 'best_p')}),
        *effects_table([e for e in found if e['named'] and e['where'] in FAMILY], SHORT, itemgetter('text')),
        SEVERAL if len(grouped(rows, 'seed')) > 1 else ONE_SEED, '',
        MAIN, *rows_table(rows, headings),
        *section(EFFECTS.format(primary=primary), effects_table(found, grouped(found, 'measure'))),
        *section(COURSE, course_table(course(header, rows))),
        *section(MATCHED, effects_table(matched(header, rows), ('score_p', 'probe')))]
    for text, of_trained, form, columns in FURTHER:
        lines += section(text, rows_table(pick(rows, recal_steps=None) if of_trained else rows, columns, form))
    lines += section('## Figures', [f'![{name}](figures/{name})\n' for name in figures])
    return '\n'.join(lines) + '\n'

def main(cfg):
    """Writes summary.md of an experiment folder, and prints its first part."""
    folder, = cfg.paths
    figures = f'{folder}/figures'
    path = f'{folder}/summary.md'
    text = summary(*runs.open_rows(folder), sorted(glob.glob('*.png', root_dir=figures)))
    runs.write_text(path, text)
    print(text.split('\n## ')[0])
    print(f'report: {path}; figures: {figures}')

if __name__ == '__main__':
    command(main, __file__, positional=True)
