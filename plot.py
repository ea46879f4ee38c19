"""
Eight figures of an experiment, from its rows and examples alone: no model is loaded, nothing measured again.

Reads runs.jsonl and examples.json of an experiment folder. Writes figures/*.png there.

    python plot.py out/demo
    python plot.py results/structured --dpi=200        # published rows are enough

Each figure is a function of the experiment, whose docstring is headline and caption. It returns the figure or, where
there is nothing to draw, says why. Names are those of the tables. A colour is an arm (attention and order of the
training rows), a line style what became of the positions. A new order or kind of positions needs nothing here: it
gets the next colour and a line of its own.
"""
import base64
import io
import os
import textwrap
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ['MPLBACKEND'] = 'Agg'                            # write files, needs no display: set before the import

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import report
import runs
from configurator import command
from report import grouped, part, pick

plt.rcParams.update({
    'font.size': 9, 'axes.titlesize': 9, 'xtick.labelsize': 7, 'legend.fontsize': 8, 'legend.frameon': False,
    'lines.markersize': 4, 'axes.spines.top': False, 'axes.spines.right': False})

# -----------------------------------------------------------------------------
# config
dpi = 110                                                   # dots per inch of every PNG [10, 1000]
# -----------------------------------------------------------------------------

COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']     # Okabe, Ito
LINES = {'rope': '-', 'kept': '--', 'drope': ':', 'nope': '-.'}
GREY = '#666666'
MARKS = {'primary': 'D', 'tested': 'o', 'explored': 'x'}     # of effects
STYLES = ['--', ':', '-.', (0, (5, 4)), '-']                # of references, which are grey

# -----------------------------------------------------------------------------
# reading

def load(folder):
    """An experiment: its rows in the order in which figures show them, and what the figures share."""
    header, rows = runs.open_rows(folder)
    for row in rows:
        row['arm'] = runs.arm_name(row)
    arms = grouped(rows, 'arm')
    colour = dict(zip(arms, COLOURS))
    shown = [row for row in rows if row['arm'] in colour]
    main = pick(shown, main=True)
    note = f'n = {len(grouped(main, "seed"))}'
    if len(arms) > len(colour):
        note += f', the first {len(colour)} of {len(arms)} arms'
    return SimpleNamespace(folder=folder, header=header, shown=shown, main=main, colour=colour, note=note)

def over_seeds(rows, path):
    """That part of every row that has it, 'heads.score_p': [n, ...]; NaN where it holds null."""
    found = [part(row, path) for row in rows]
    return np.array([x for x in found if x is not None], float)

# -----------------------------------------------------------------------------
# drawing

def canvas(rows, columns, height, **grid):
    """A figure and its panels [rows, columns], `height` inches a row."""
    return plt.subplots(
        rows, columns, figsize=(11, 1 + rows * height), layout='constrained', squeeze=False, **grid)

def explain(fig, exp, docstring):
    """The headline above the panels, below them how to read them and, beside them, every label of a line, once."""
    headline, _, caption = docstring.partition('\n')
    fig.suptitle(f'{exp.header["experiment"]}: {headline} ({exp.note})', x=0.01, ha='left', weight='bold')
    fig.supxlabel(textwrap.fill(' '.join(caption.split()), 150), x=0.01, ha='left', size=9, color=GREY)
    found = {}
    for ax in fig.axes:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles))
    if found:
        names = sorted(found, key=lambda name: '_' not in name)             # arms, then references
        fig.legend([found[name] for name in names], names, loc='outside right upper')

# -----------------------------------------------------------------------------
# 1: losses

def plot_loss(exp):
    """Validation loss, mean over seeds

    After the first tenth of the steps; beside a name the last loss. Solid: RoPE, dashed: kept, dotted: dropped,
    dash-dotted: never had. Grey: references; one outside a panel is named only."""
    fig, axes = canvas(1, 2, 4.2)
    for name, rows in grouped(exp.main, 'condition').items():
        row = rows[0]
        steps = np.array(row['curve']['step'])
        loss = over_seeds(rows, 'curve.val_loss').mean(0)
        late = np.isfinite(loss) & (steps >= steps[-1] / 10)
        axes[0, int(row['recal_steps'] is not None)].plot(
            steps[late], loss[late], label=f'{name} {loss[-1]:.3f}', color=exp.colour[row['arm']],
            ls=LINES.get(row['positions'], (0, (1, 4))), marker='.')
    for ax, title in zip(axes[0], ('training', 'recalibration')):
        ax.set(title=title, xlabel='steps', ylabel='loss (nats per token)', ylim=ax.get_ylim())
        for name, style in zip(exp.main[0]['references'], STYLES):
            nats = over_seeds(exp.main, f'references.{name}')
            if len(nats):
                ax.axhline(nats.mean(), color=GREY, ls=style, label=f'{name} {nats.mean():.3f}')
    return fig

# -----------------------------------------------------------------------------
# 2: the order of the rows

def plot_order(exp):
    """Order of the training rows, of the first seed

    Share of every dominant topic (a colour) among the rows read since the point before. c4: four rounds; cd20: the
    last 20% of the steps shuffled; pure: rows of one segment. Recalibration is shuffled."""
    arms = grouped(pick(exp.main, recal_steps=None), 'arm')
    if not arms:
        return 'no row of a training run'
    fig, axes = canvas(len(arms), 1, 1, sharex=True)
    for (arm, mine), ax in zip(arms.items(), axes.flat):
        curve = mine[0]['curve']
        counts = np.array(curve['topics'])                  # [points, K] rows read since the point before
        share = counts / counts.sum(1, keepdims=True).clip(1)
        ax.set_prop_cycle(color=plt.cm.viridis(np.linspace(0, 1, counts.shape[1])))
        ax.stackplot(curve['step'], share.T, step='pre')
        ax.margins(0)
        ax.set(title=arm, ylabel='share', yticks=[0, 1])
    ax.set_xlabel('training steps')
    return fig

# -----------------------------------------------------------------------------
# 3: heads

def plot_heads(exp):
    """Score P of every head, mean over seeds

    P: log ratio of attention to keys of the query's topic over others, matched by position. 0: position alone
    decides. Above: topic or contiguity attracts. Beside a name: mean of heads. Lines across the colours, where they
    reach: P of equal bigrams, black, and of the posterior of bigrams, grey."""
    rows = [row for row in exp.main if report.value(row, 'score_p') is not None]
    arms = list(grouped(rows, 'arm'))
    positions = list(grouped(rows, 'positions'))
    if not arms:
        return 'no row has P'
    limit = np.clip(np.nanmax(abs(over_seeds(rows, 'heads.score_p'))), 0.1, 1)
    fig, axes = canvas(len(arms), len(positions), 1.5)
    for name, mine in grouped(rows, 'condition').items():
        P = over_seeds(mine, 'heads.score_p').mean(0)       # [n_layer, n_head]
        ax = axes[arms.index(mine[0]['arm']), positions.index(mine[0]['positions'])]
        image = ax.imshow(P, cmap='PuOr_r', vmin=-limit, vmax=limit, aspect='auto')
        mean = over_seeds(mine, 'mean.score_p').mean()
        ax.set(xlabel='head', ylabel='layer')
        ax.set_title(f'{name} {mean:+.3f}', size=7)
        ax.locator_params(integer=True)
    bar = fig.colorbar(image, ax=axes, label='P (log ratio)')
    bar.ax.hlines(over_seeds(rows, 'bigram.equal.score_p'), 0, 1, color='black')
    bar.ax.hlines(over_seeds(rows, 'bigram.posterior.score_p'), 0, 1, color=GREY)
    bar.ax.set_ylim(-limit, limit)
    return fig

# -----------------------------------------------------------------------------
# 4: maps

def plot_maps(exp):
    """The head with the highest P, of the first seed

    Attention on one validation row; brightness: its power 0.4, from 0 to the largest weight of a map. Lines: topic
    boundaries; numbers: the topic that starts there. L2H1: layer 2, head 1, counted from 0."""
    examples = runs.read_json(f'{exp.folder}/examples.json') or {}
    shown = [name for name in grouped(exp.main, 'condition') if name in examples]
    if not shown:
        return 'examples.json has no attention maps of these runs'
    fig, axes = canvas((len(shown) + 3) // 4, 4, 3)
    for name, ax in zip(shown, axes.flat):
        example = examples[name]
        topics = np.array(example['topics'])
        T = len(topics)
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(example['uint8'])), np.uint8)
        ax.imshow(np.where(np.tri(T), pixels.reshape(T, T) ** 0.4, np.nan))
        starts = np.flatnonzero(np.diff(topics, prepend=-1))
        ax.set_xticks(starts - 0.5, topics[starts])
        ax.set_yticks(starts - 0.5, topics[starts])
        ax.grid(color='white')
        P = runs.show(example['score_p'], '+.2f')
        ax.set(title=f'{name}\nL{example["layer"]}H{example["head"]}, P {P}', xlabel='keys', ylabel='queries')
    return fig

# -----------------------------------------------------------------------------
# 5 and 8: numbers by layer

class Line(NamedTuple):
    """A line of panels, one for each kind of positions; y and what follows are paths in a row of runs.jsonl."""
    ylabel: str
    xlabel: str
    y: str
    references: dict        # name -> path of a number or of a list; chance has the colour of its arm
    ticks: str = ''         # path of the labels of the x axis; '': 0, 1, 2 ...
    minus: str = ''         # path of what is subtracted

PROBE = [
    Line('accuracy', 'layers passed', 'probe.accuracy', {
        'Bayes filter': 'probe.references.ceiling',
        'untrained': 'probe.references.untrained',
        'running mean': 'probe.references.running_mean',
        'token': 'probe.references.token',
        'majority': 'probe.references.majority'}),
    Line('accuracy, last layer', 'tokens since the boundary', 'probe.by_distance.accuracy', {
        'Bayes filter': 'probe.by_distance.ceiling'}, ticks='probe.by_distance.distance')]
LENS = [
    Line('share, all tokens', 'layers passed, norm, logit', 'lens.projection.value', {
        'chance': 'lens.projection.chance'}),
    Line('others, above chance', 'layers passed, norm, logit', 'lens.projection_others.value', {
        'SD of chance': 'lens.projection_others.chance_sd'}, minus='lens.projection_others.chance'),
    Line('QK rank', 'layer', 'heads.qk_rank', {'at initialisation': 'init_rank.qk_rank'}),
    Line('OV rank', 'layer', 'heads.ov_rank', {'at initialisation': 'init_rank.ov_rank'})]

def plot_probe(exp):
    """Topic in the residual stream, mean over seeds

    Accuracy of a linear probe; faint: seeds. Above, by layer, beside what the majority, the token, the last 32
    tokens' embeddings and the untrained model tell; the Bayes filter is the ceiling. Below, after the last layer, by
    distance from the last topic boundary."""
    return plot_lines(exp, PROBE)

def plot_lens(exp):
    """Own topic by depth, and ranks, mean over seeds

    Share of the hidden state (last point: of the logit) that tokens of the own topic contributed, exact and linear.
    Below it without the position's own token, minus chance (labels of other rows). Effective rank of QK and OV: mean
    over heads. Faint: seeds."""
    return plot_lines(exp, LENS)

def plot_lines(exp, table):
    """Numbers by layer: a column of panels for each kind of positions, a row for each line of the table."""
    lines = [line for line in table if len(over_seeds(exp.main, line.y))]
    if not lines:
        return f'no row has {table[0].y}'
    columns = grouped(exp.main, 'positions')
    fig, axes = canvas(len(lines), len(columns), 2.2, sharey='row')
    for line, across in zip(lines, axes):
        across[0].set_ylabel(line.ylabel)
        for (positions, rows), ax in zip(columns.items(), across):
            ax.set(title=positions, xlabel=line.xlabel)
            for arm, mine in grouped(rows, 'arm').items():
                draw_line(ax, line, mine, exp.colour[arm])
    return fig

def draw_line(ax, line, rows, colour):
    """An arm in one panel of numbers by layer: faint, every seed; bold, the mean; grey, the references."""
    y = over_seeds(rows, line.y)                            # [n, points]; of heads [n, n_layer, n_head]
    if not len(y):
        return
    if y.ndim == 3:
        y = y.mean(2)
    if line.minus:
        y -= over_seeds(rows, line.minus)
    ax.plot(y.T, color=colour, alpha=0.2)
    ax.plot(y.mean(0), 'o-', color=colour, label=rows[0]['arm'])
    x = range(y.shape[1])
    ax.set_xticks(x, part(rows[0], line.ticks) or x)
    for (name, path), style in zip(line.references.items(), STYLES):
        level = over_seeds(rows, path)
        if len(level):
            grey = colour if name == 'chance' else GREY
            ax.plot(np.broadcast_to(level.mean(0), len(x)), color=grey, ls=style, label=name)

# -----------------------------------------------------------------------------
# 6: effects

def plot_effects(exp):
    """Paired differences

    Arm minus arm in the same seeds; bars: 95% interval (of one seed none); p: summary.md. Diamond: the primary
    measure; circle: tested family; cross: explored."""
    found = report.effects(exp.header, exp.shown)
    if not found:
        return 'no two arms have a seed in common'
    keys = grouped(found, 'measure')
    n = len(grouped(found, 'label'))
    fig, axes = canvas((len(keys) + 2) // 3, 3, 0.75 + 0.19 * n, sharey=True)
    for (key, of_key), ax in zip(keys.items(), axes.flat):
        measure = report.MEASURES[key]
        ax.set(title=measure.heading, xlabel=f'difference ({measure.unit})')
        ax.axvline(0, color=GREY)
        ax.locator_params('x', nbins=5)
        ax.set_ylim(n, -1)                                  # from above, as in the tables
        for e in of_key:
            colour = exp.colour[e['arms'][0]]
            ax.plot([e['low'], e['high']], [e['label']] * 2, color=colour)
            ax.plot(e['mean'], e['label'], MARKS[e['kind']], color=colour)
    return fig

# -----------------------------------------------------------------------------
# 7: the course

def plot_course(exp):
    """What order leaves, by recalibration

    Arm minus base. Level: trained, with RoPE; dashed, squares: recalibrated with RoPE kept; dotted, circles:
    dropped; faint: seeds. Bars and bands: 95% interval of the mean. Bands: the controls, dropped (the schedule without
    its topics; another shuffle)."""
    found = report.course(exp.header, exp.shown)
    named = pick(found, named=True)
    if not named:
        return 'no length has the arms of the primary measure, with RoPE kept and dropped'
    measure = report.MEASURES[exp.header['compare']['primary'][0]]
    fig, ((ax,),) = canvas(1, 1, 4.2)
    ax.axhline(0, color=GREY, lw=1)
    for course in grouped(found, 'label').values():
        draw_course(exp, ax, course)
    ax.set(xscale='log', xlabel='steps of recalibration', ylabel=f'{measure.heading}: difference ({measure.unit})')
    ticks = {c['steps']: f'{c["steps"]}\nn = {c["drope"]["n"]}' for c in named}
    ax.set_xticks(list(ticks), ticks.values())
    ax.set_xlim(min(ticks) / 1.5, max(ticks) * 1.5)         # of one length too
    ax.minorticks_off()
    return fig

def draw_course(exp, ax, course):
    """A contrast along the lengths: lines if it is the primary's, a band if it is a control."""
    first = course[0]
    colour = exp.colour[first['arms'][0]]
    rope = first['rope']
    if first['named'] and rope['n']:
        ax.axhline(rope['mean'], color=colour, label=rope['label'])
    for where, marker, shift in (('kept', 's', 0.98), ('drope', 'o', 1.02)):    # beside one another
        line = [c[where] for c in course]
        label = line[0]['label']
        steps = [c['steps'] * shift for c in course]
        low, mean = np.array([(e['low'], e['mean']) for e in line], float).T
        style = {'color': colour, 'ls': LINES[where]}
        if first['named']:
            ax.errorbar(steps, mean, mean - low, marker=marker, label=label, **style)
            for seed in line[0]['differences']:
                ax.plot(steps, [e['differences'].get(seed, np.nan) for e in line], alpha=0.2, **style)
        elif where == 'drope' and first['control']:
            ax.fill_between(steps, low, 2 * mean - low, alpha=0.2, label=label, **style)

# -----------------------------------------------------------------------------

FIGURES = [plot_loss, plot_order, plot_heads, plot_maps, plot_probe, plot_effects, plot_course, plot_lens]

def main(cfg):
    """Draws every figure of the folder in cfg.paths, and prints the paths of the files."""
    exp = load(cfg.paths[0])
    for draw in FIGURES:
        path = f'{exp.folder}/figures/{draw.__name__.removeprefix("plot_")}.png'
        figure = draw(exp)
        if isinstance(figure, str):
            print(f'{path} is not drawn: {figure}')
            Path(path).unlink(missing_ok=True)              # of an earlier report
            continue
        explain(figure, exp, draw.__doc__)
        for ax in figure.axes:
            ax.set_visible(ax.has_data())
        large, small = io.BytesIO(), io.BytesIO()
        figure.savefig(large, dpi=cfg.dpi)
        plt.close(figure)
        image = Image.open(large).convert('RGB').quantize(255, Image.Quantize.MAXCOVERAGE)
        image.save(small, 'PNG', optimize=True)             # a third of the bytes
        runs.write_bytes(path, small.getvalue())
        print(path)

if __name__ == '__main__':
    command(main, __file__, positional=True)
