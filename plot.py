"""
Figures of an experiment, from its JSON files alone: no model is loaded and nothing is computed again.

    python plot.py out/structured             # every figure -> out/structured/figures/; or results/structured
    python plot.py out/structured out/wiki    # the two side by side, in one figure

What is missing is left out: a run without analysis.json, a reference loss that is null, an arm that never ran.
"""
import base64, glob, json, os, re, textwrap, zlib

import numpy as np
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, PowerNorm
from configurator import configure
plt.switch_backend('Agg')  # write files; needs no display

# -----------------------------------------------------------------------------
dpi = 160                                   # dots per inch of every PNG
fig_width = 8.5                             # inches; with dpi 160 sharp at README width
map_orders = ('shuffled', 'topic_ordered')  # orders whose attention maps and spectra are drawn
map_gamma = 0.4                             # attention maps: colour = attention ** gamma, to show the weak
# -----------------------------------------------------------------------------

STAGES = {'rope': ('RoPE', '-'), 'kept': ('kept', '--'), 'drope': ('DroPE', ':'), 'nope': ('NoPE', '-.')}
ORDERS = {'shuffled': '#0072B2', 'topic_ordered': '#D55E00', 'pseudo': '#009E73'}  # Okabe-Ito
SPARE = ['#CC79A7', '#E69F00', '#56B4E9', '#000000']                               # orders that a fork adds
TOPICS = ['#77AADD', '#EE8866', '#EEDD88', '#44BB99', '#FFAABB', '#BBCC33', '#99DDFF', '#AAAA00']  # Tol's light
MEASURES = {'score_p': ('score P', 'log ratio'), 'score_o': ('score O', 'log ratio'),
            'probe': ('topic probe', 'accuracy'), 'val_loss': ('validation loss', 'nats per token'),
            'within': ('within-topic attention', 'share'), 'entropy': ('attention entropy', 'nats')}
GREY, BAR = '#666666', dict(aspect=30, fraction=.03, pad=.015)  # BAR: a slim colour bar
CAPTIONS = {
    'loss': ('Loss', 'Bold: validation. Faint: training, first seed. Dashed: RoPE kept, dotted: dropped.'),
    'order': ('Order of the training rows', 'Share of each dominant topic (a colour) in the rows, first seed. The '
              'last epoch is cut to what the steps need.'),
    'scores_p': ('Score P of every head', '0: position alone decides. Above: same topic or segment attracts.'),
    'maps': ('The most and the least topical head', 'One validation row, first seed. Strips: topics of queries '
             '(left) and keys (below). L2H1: layer 2, head 1, from 0; P on the rows that chose it.'),
    'probe': ('Topic in the residual stream', 'Linear probe. Token: from the token alone. Bayes filter: the ceiling.'),
    'distance': ('How soon the topic is known', 'Linear probe after the last layer. The Bayes filter, best overall, '
                 'still expects the old topic right after a boundary.'),
    'spectra': ('Singular values over the largest', 'Mean over heads. Solid: RoPE, dotted: DroPE.'),
    'effects': ('Paired effects of the order', 'Bars: 95% interval, p: sign flips, unadjusted. Shaded: main.'),
    'compare': ('Side by side', 'Upper half: arms, small: seeds. Lower half: paired differences, 95% '
                'intervals. Squares: GQA. Loss gap: to the filter, else the first arm. Probe: half the layers.')}

# -----------------------------------------------------------------------------
# reading

def read(path):
    """A JSON file, or the rows of a .jsonl file; None where there is no file."""
    if not os.path.exists(path):
        return None
    rows, text = [], open(path).read()
    lines = text.splitlines() if path.endswith('.jsonl') else [text]
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if i == 0 or i < len(lines) - 1:  # only a last row may be cut short, by a kill
                raise SystemExit(f'{path}: not valid JSON ({e}); delete it and run its stage again') from None
    return rows if path.endswith('.jsonl') else rows[0]

def load(folder):
    """A folder -> {name, folder, refs, colour, effects, runs: [{attn, order, stage, seed, log, ana}]}."""
    if not os.path.isdir(folder):
        raise SystemExit(f'{folder}: no such folder; give an experiment folder such as out/demo')
    runs = []
    for path in glob.glob(f'{glob.escape(folder)}/*/seed*'):
        m = re.fullmatch(r'.*/([a-z]+)_(\w+)_([a-z]+)/seed(\d+)', path.replace(os.sep, '/'))
        if m and m[3] in STAGES:
            log = [row for row in read(f'{path}/log.jsonl') or [] if 'step' in row]
            runs.append(dict(attn=m[1], order=m[2], stage=m[3], seed=int(m[4]), log=log,
                             ana=read(f'{path}/analysis.json')))
    runs.sort(key=lambda r: (r['seed'], r['attn'] != 'mha', [*ORDERS, r['order']].index(r['order']), r['order'],
                             [*STAGES].index(r['stage'])))
    summary = read(f'{folder}/summary.json') or {}
    refs = summary.get('references') or next((r['ana']['references'] for r in runs if r['ana']), None) or {}
    n = len({r['seed'] for r in runs})
    return dict(name=os.path.basename(os.path.abspath(folder)), folder=folder,
                seeds=f'Mean of n={n} seeds.' if n > 1 else 'One seed (n=1: no interval).',
                effects=[e for e in summary.get('effects', []) if e['mean'] is not None],
                refs={k: v for k, v in refs.items() if v is not None}, runs=runs,
                colour=dict(zip([o for o in present(runs, 'order') if o not in ORDERS], SPARE * 9), **ORDERS))

def pick(runs, **kw):
    return [r for r in runs if all(r[k] == v for k, v in kw.items())]

def present(runs, key):
    """The values of a key in these runs, in the order in which figures show them."""
    first = {'attn': ['mha', 'gqa'], 'order': list(ORDERS), 'stage': list(STAGES)}[key]
    return sorted({r[key] for r in runs}, key=lambda k: (first.index(k) if k in first else len(first), k))

def mean(values):
    """Mean over the first axis of what is defined (null in the JSON is not); NaN where nothing is."""
    return np.ma.filled(np.ma.masked_invalid(np.array(values, float)).mean(0), np.nan)

# -----------------------------------------------------------------------------
# drawing

def plain(text):
    """Names as figures write them: 'mha topic_ordered - shuffled, drope' -> 'MHA topic − shuffled, DroPE'."""
    text = re.sub(r'_c(\d+)', r' ×\1', text).replace('_ordered', '').replace('_', ' ').replace(' - ', ' − ')
    names = {'mha': 'MHA', 'gqa': 'GQA', **{k: v[0] for k, v in STAGES.items()}}
    return re.sub(r'\w+', lambda m: names.get(m[0], m[0]), text)

def canvas(cfg, exp, name, rows, cols, height, **kw):
    """A figure of rows x cols panels, `height` inches a row, with a headline and a line on how to read it."""
    plt.rcParams.update({'font.size': 9, 'axes.titlesize': 9.5, 'axes.titlelocation': 'left',
        'axes.linewidth': .7, 'axes.edgecolor': '#999999', 'axes.spines.top': False, 'axes.spines.right': False,
        **{f'{x}tick.{k}': v for x in 'xy' for k, v in {'color': '#999999', 'labelcolor': '#333333'}.items()}})
    title, sub = CAPTIONS[name]
    sub = textwrap.wrap(sub + (name not in ('order', 'maps')) * f' {exp["seeds"]}', int(15.2 * cfg.fig_width))
    top = .40 + .16 * len(sub)
    tall = rows * height + top
    fig = plt.figure(figsize=(cfg.fig_width, tall), layout='constrained')
    axes = fig.subplots(rows, cols, squeeze=False, **kw)
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - top / tall), w_pad=.06, h_pad=.06)
    fig.text(.008, 1 - .07 / tall, f'{title}: {exp["name"]}', va='top', fontsize=12, weight='bold')
    fig.text(.008, 1 - .31 / tall, '\n'.join(sub), va='top', color=GREY, linespacing=1.2)
    return fig, axes

def save(fig, cfg, exp, name):
    path = os.path.join(exp['folder'], 'figures', f'{name}.png')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=cfg.dpi, facecolor='white', metadata={'Software': None})
    plt.close(fig)
    return path

def end_labels(ax, labels):
    """(y, text, colour) right of a panel whose y limits are final, pushed apart where they would overlap."""
    lo, hi = ax.get_ylim()
    labels = sorted((l for l in labels if np.isfinite(l[0])), key=lambda l: l[0])
    want = np.clip([(y - lo) / (hi - lo) for y, _, _ in labels], 0, 1)
    gap, at = 9 * 1.35 / 72 * ax.figure.dpi / ax.get_window_extent().height, want.copy()
    for _ in range(500):
        for i in range(len(at) - 1):
            push = max(0, gap - (at[i + 1] - at[i])) / 2
            at[i], at[i + 1] = max(.03, at[i] - push), min(1, at[i + 1] + push)
    for (_, text, c), y0, y1 in zip(labels, want, at):
        ax.plot([1.005, 1.04], [y0, y1], color=c, lw=.7, transform=ax.transAxes, clip_on=False)
        ax.text(1.05, y1, text, color=c, va='center', transform=ax.transAxes)

def side_name(ax, text, c):
    ax.annotate(text, (0, .5), (-36, 0), 'axes fraction', 'offset points', rotation=90, ha='center', va='center',
                color=c, weight='bold')

def fill(axes, keys, have):
    """[(panel, key)] of the keys that there is data for; the other panels are hidden."""
    keys = [*keys, *[None] * axes.size][:axes.size]
    for ax, key in zip(axes.flat, keys):
        ax.set_visible(key in have)
    return [(ax, key) for ax, key in zip(axes.flat, keys) if key in have]

def curve(runs, key):
    """Steps, and the mean over the seeds that logged each."""
    steps = {}
    for row in (row for r in runs for row in r['log'] if row.get(key) is not None):
        steps.setdefault(row['step'], []).append(row[key])
    return np.array(sorted(steps)), np.array([np.mean(steps[s]) for s in sorted(steps)])

# -----------------------------------------------------------------------------
# the figures, each of the runs that hold what it needs, in order of seed; each returns its path

def plot_loss(cfg, exp, runs):
    phases = {'training': ('rope', 'nope'), 'recalibration': ('kept', 'drope')}
    have = {(r['attn'], p) for r in runs for p in phases if r['stage'] in phases[p]}
    attns, shown = present(runs, 'attn'), [p for p in phases if any(p in pair for pair in have)]
    fig, axes = canvas(cfg, exp, 'loss', len(attns), len(shown), 2.7)
    for ax, (attn, phase) in fill(axes, [(a, p) for a in attns for p in shown], have):
        refs, ends, seen = exp['refs'], [], [y for k, y in exp['refs'].items() if k == 'filter']
        for order, stage in ((o, s) for o in present(runs, 'order') for s in phases[phase]):
            group, c = pick(runs, attn=attn, order=order, stage=stage), exp['colour'][order]
            x, y = curve(group, 'val_loss')
            if len(x):
                ax.plot(*curve(group[:1], 'loss'), color=c, lw=.8, alpha=.22, zorder=1)
                ax.plot(x, y, STAGES[stage][1], color=c, lw=1.8, zorder=3)
                ends.append((y[-1], plain(f'{order} {stage}').replace(' RoPE', '') + f' {y[-1]:.3f}', c))
                seen += list(y[x >= .08 * x[-1]])  # the first fall from ln V would flatten all the rest
        pad = .07 * (max(seen) - min(seen)) + 1e-3
        lo, hi = min(seen) - pad, max(seen) + pad
        for k, y in refs.items():  # a reference off the panel is named at its edge
            ends.append((y, f'{"↑ " if y > hi else "↓ " if y < lo else ""}{k} {y:.3f}', GREY))
            ax.axhline(y, color=GREY, lw=.8, zorder=0)
        ax.set(ylim=(lo, hi), title=plain(f'{attn}, {phase}'), xlabel='steps', ylabel='loss (nats per token)')
        ax.locator_params(axis='x', nbins=5)
        end_labels(ax, ends)
    return save(fig, cfg, exp, 'loss')

def plot_order(cfg, exp, runs):
    orders = present(runs, 'order')
    fig, axes = canvas(cfg, exp, 'order', len(orders), 1, .95, sharex=True)
    for ax, order in zip(axes.flat, orders):
        log = [row for row in pick(runs, order=order)[0]['log'] if sum(row.get('topics') or [])]
        x, share = [row['step'] for row in log], np.array([row['topics'] for row in log], float).T
        ax.stackplot(x, share / share.sum(0), colors=TOPICS, step='pre', lw=.3, edgecolor='white')
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1), yticks=[0, 1], yticklabels=['0', '100%'])
        ax.set_title(plain(order), color=exp['colour'][order], weight='bold')
    ax.set_xlabel('training steps')
    return save(fig, cfg, exp, 'order')

def plot_scores_p(cfg, exp, runs):
    grids = {}
    for r in runs:
        grids.setdefault((r['attn'], r['order'], r['stage']), []).append(r['ana']['heads']['score_p'])
    grids, stages = {k: mean(g) for k, g in grids.items()}, present(runs, 'stage')
    arms = [(a, o) for a in present(runs, 'attn') for o in present(pick(runs, attn=a), 'order')]
    L, H = next(iter(grids.values())).shape
    # one extreme head should not pale the others; below 0.1 it is all noise, and should look it
    v = max(.1, np.nanpercentile(np.abs([*grids.values()]), 99))
    fig, axes = canvas(cfg, exp, 'scores_p', len(arms), len(stages), np.clip(.47 + .24 * L, 1.3, 2.4))
    for ax, (a, o, s) in fill(axes, [(*arm, s) for arm in arms for s in stages], grids):
        g = grids[a, o, s]
        image = ax.imshow(g, cmap='PuOr_r', vmin=-v, vmax=v, aspect='auto')
        for l, h in np.ndindex(L, H) if L * H <= 32 else ():  # where numbers have room
            p = round(g[l, h], 2 + (v < .1)) + 0                  # + 0: no minus before zero
            ax.text(h, l, '–' if np.isnan(p) else f'{p:.{2 + (v < .1)}f}', ha='center', va='center',
                    color='white' if abs(g[l, h]) > .6 * v else '#333333')
        ax.set(title=f'{STAGES[s][0]}, mean {mean(g.ravel()):.3f}', facecolor='#dddddd', xlabel='head',
               ylabel='layer', xticks=range(0, H, 1 + H // 13), yticks=range(0, L, 1 + L // 13))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if s == stages[0]:
            side_name(ax, plain(f'{a} {o}'), exp['colour'][o])
        ax.label_outer()
    fig.colorbar(image, ax=axes, label='P (log ratio)', extend='both', **BAR)
    return save(fig, cfg, exp, 'scores_p')

def plot_maps(cfg, exp, runs):
    runs, panels = pick(runs, attn=present(runs, 'attn')[0]), {}
    orders = [o for o in present(runs, 'order') if o in cfg.map_orders] or present(runs, 'order')[:2]
    for r, m in ((r, m) for r in runs if r['order'] in orders for m in r['ana']['maps']):
        A = np.frombuffer(zlib.decompress(base64.b64decode(m['uint8'])), np.uint8).reshape(m['shape'])
        panels.setdefault((r['order'], m['which'], r['stage']), (m, A / 255 * m['max']))  # the first seed's
    columns = sorted({k[1:] for k in panels}, key=lambda c: (c[0] != 'most topical', [*STAGES].index(c[1])))
    fig, axes = canvas(cfg, exp, 'maps', len(orders), len(columns), 9.6 / max(3, len(columns)))
    norm = PowerNorm(cfg.map_gamma, 0, max(np.percentile(A[A > 0], 99) for _, A in panels.values()))
    for ax, (o, w, s) in fill(axes, [(o, *c) for o in orders for c in columns], panels):
        m, A = panels[o, w, s]
        T, z = len(A), np.array(m['topics']) % len(TOPICS)
        image = ax.imshow(np.where(np.tri(T, dtype=bool), A, np.nan), cmap='viridis', norm=norm)
        for b in np.flatnonzero(np.diff(z)) + .5:  # boundaries, inside the causal triangle
            ax.plot([-.5, b, b], [b, b, T - .5], color='white', lw=.7, alpha=.8)
        for box, strip in (([0, -.075, 1, .055], z[None]), ([-.075, 0, .055, 1], z[:, None])):
            inset = ax.inset_axes(box)
            inset.imshow(strip, cmap=ListedColormap(TOPICS), vmin=0, vmax=len(TOPICS) - 1, aspect='auto')
            inset.set_axis_off()
        p = 'undefined' if m['score_p'] is None else f'{m["score_p"]:.3f}'
        ax.set(xlim=(-.5, T - .5), ylim=(T - .5, -.5),
               title=f'{w}, {STAGES[s][0]}\nL{m["layer"]}H{m["head"]}, P = {p}')
        ax.axis('off')
        if (w, s) == columns[0]:
            side_name(ax, plain(f'{runs[0]["attn"]} {o}'), exp['colour'][o])
    fig.colorbar(image, ax=axes, label=f'attention (colour scale: power {cfg.map_gamma:g})', extend='max', **BAR)
    return save(fig, cfg, exp, 'maps')

def plot_probe(cfg, exp, runs, name='probe'):
    attns, stages, first = present(runs, 'attn'), present(runs, 'stage'), runs[0]['ana']['probe']
    L = len(first['accuracy']) - 1
    ticks, get, refs = range(L + 1), lambda p: p['accuracy'], ('majority', 'token', 'ceiling')
    if name == 'distance':
        ticks, get, refs = first['distance'], lambda p: p['by_distance'][L], ('ceiling_by_distance',)
    fig, axes = canvas(cfg, exp, name, len(attns), len(stages), 2.5, sharey=True)
    for ax, (attn, stage) in fill(axes, [(a, s) for a in attns for s in stages],
                                  {(r['attn'], r['stage']) for r in runs}):
        group, ends = pick(runs, attn=attn, stage=stage), []
        lines = [('Bayes filter' if 'ceiling' in k else k, GREY, [r['ana']['probe'].get(k) for r in group])
                 for k in refs]
        lines += [(o, exp['colour'][o], [get(r['ana']['probe']) for r in pick(group, order=o)])
                  for o in present(group, 'order')]
        for label, c, y in (line for line in lines if line[2][0] is not None):
            y, bold = np.array([np.broadcast_to(np.array(v, float), len(ticks)) for v in y]), c != GREY
            ax.plot(y.T, color=c, lw=.7 * bold, alpha=.3)
            y = mean(y)
            ax.plot(y, 'o-' if bold else '-', color=c, lw=1.8 if bold else .9, ms=3.5, zorder=2 + bold)
            ends += [(v, plain(label), c) for v in y[np.isfinite(y)][-1:]]
        ax.set(ylim=(0, 1.02), title=plain(f'{attn}, {stage}'), ylabel='probe accuracy',
               xlabel='layers passed (0: embedding)' if name == 'probe' else 'tokens since the boundary')
        ax.set_xticks(range(len(ticks)), ticks)
        ax.label_outer()
        if stage == present(pick(runs, attn=attn), 'stage')[-1]:
            end_labels(ax, ends)
    return save(fig, cfg, exp, name)

def plot_distance(cfg, exp, runs):
    return plot_probe(cfg, exp, runs, name='distance')

def plot_spectra(cfg, exp, runs):
    runs = pick(runs, attn=present(runs, 'attn')[0])
    orders = [o for o in present(runs, 'order') if o in cfg.map_orders] or present(runs, 'order')[:2]
    L = len(runs[0]['ana']['circuits']['ov'])
    shades = ListedColormap([plt.cm.viridis(.92 * l / max(1, L - 1)) for l in range(L)])
    fig, axes = canvas(cfg, exp, 'spectra', len(orders), 2, 2.3, sharey=True)
    for ax, (order, name) in zip(axes.flat, ((o, c) for o in orders for c in ('QK at distance 0', 'OV'))):
        for stage in ('rope', 'drope'):
            s = [r['ana']['circuits'] for r in pick(runs, order=order, stage=stage)]
            s = np.array([c['ov'] if name == 'OV' else c['qk']['0'] for c in s], float)  # (seed, layer, head, k)
            for l in range(L if len(s) else 0):
                y = (s[:, l] / s[:, l].max(-1, keepdims=True)).mean((0, 1))
                ax.plot(range(1, len(y) + 1), y, STAGES[stage][1], lw=1.5, color=shades(l))
        ax.set(title=plain(f'{runs[0]["attn"]} {order}: ') + name, xlabel='rank', ylabel='value', ylim=(0, 1.02))
        ax.label_outer()
    image = plt.cm.ScalarMappable(plt.Normalize(-.5, L - .5), shades)
    fig.colorbar(image, ax=axes, label='layer', ticks=range(L), **BAR)
    return save(fig, cfg, exp, 'spectra')

def contrast_colour(name):
    """Of a paired difference: the first arm's, dark where the second is not shuffled."""
    return ORDERS['pseudo' if 'pseudo -' in name else 'topic_ordered'] if name.endswith('shuffled') else '#333333'

def plot_effects(cfg, exp, effects):
    effects = {(e['measure'], *e['contrast'].rsplit(', ', 1)): e for e in effects}
    rows = [(g, w) for g in dict.fromkeys(k[1] for k in effects) for w in ('', *STAGES, 'drope - kept')
            if not w or any(k[1:] == (g, w) for k in effects)]  # '': the headline of a group
    measures = [m for m in MEASURES if any(k[0] == m for k in effects)]
    n, cols = max(e['n'] for e in effects.values()), min(3, len(measures))
    fig, axes = canvas(cfg, exp, 'effects', -(-len(measures) // cols), cols, .6 + .2 * len(rows), sharey=True)
    for ax, m in fill(axes, measures, measures):
        ax.axvline(0, color=GREY, lw=.8)
        for y, (group, what) in ((y, r) for y, r in enumerate(rows) if (m, *r) in effects):
            e, c = effects[m, group, what], contrast_colour(group)
            ax.plot(e['mean'], y, 'D' if ' - ' in what else 'o', color=c, ms=5.5)
            if e['low'] is not None:
                ax.plot([e['low'], e['high']], [y, y], color=c, lw=1.6)
                ax.text(1.02, y, f'p {e["p"]:.3f}' + (f', n={e["n"]}' if e['n'] < n else ''), va='center',
                        transform=ax.get_yaxis_transform())
            if e.get('primary'):
                ax.axhspan(y - .45, y + .45, color='#f3e3b5', lw=0, zorder=0)
        ax.set(ylim=(len(rows) - .4, -.6), title=MEASURES[m][0], xlabel=MEASURES[m][1])
        ax.set_yticks(range(len(rows)), [plain(what or group) for group, what in rows])
        ax.tick_params(axis='y', length=0)
        ax.locator_params(axis='x', nbins=4)
        ax.margins(x=.1)
        plt.setp([t for t, (_, what) in zip(ax.get_yticklabels(), rows) if not what], weight='bold')
    return save(fig, cfg, exp, 'effects')

def plot_compare(cfg, a, b):
    gets = {'val_loss': lambda ana: ana['val_loss'], 'score_p': lambda ana: mean([ana['mean']['score_p']]),
            'probe': lambda ana: ana['probe']['accuracy'][(len(ana['probe']['accuracy']) - 1) // 2]}
    bayes, names = all('filter' in e['refs'] for e in (a, b)), {}
    ticks = [*present(a['runs'] + b['runs'], 'stage'), 'drope - kept']
    title = dict(name=f'{a["name"]} and {b["name"]}', seeds='')
    fig, axes = canvas(cfg, title, 'compare', 6, 2, 1.4, sharey='row', sharex=True)
    for exp, col in zip((a, b), axes.T):
        runs, points = [r for r in exp['runs'] if r['ana']], {}  # (row, attention, arm or contrast, stage)
        for i, m in enumerate(gets):
            zero = 0 if i else exp['refs']['filter'] if bayes else gets[m](runs[0]['ana'])
            for r in runs:
                points.setdefault((i, r['attn'], r['order'], r['stage']), []).append(gets[m](r['ana']) - zero)
            for e in (e for e in exp['effects'] if e['measure'] == m):
                arms, stage = e['contrast'].rsplit(', ', 1)
                points[i + 3, *arms.split(' ', 1), stage] = [e['mean'], e['low'], e['high']]
        for (i, attn, arm, stage), y in ((k, np.array(y, float)) for k, y in points.items() if k[3] in ticks):
            peers = [*dict.fromkeys(k[1:3] for k in points if k[0] == i)]
            x = ticks.index(stage) + .6 * ((peers.index((attn, arm)) + .5) / len(peers) - .5)
            c = exp['colour'].get(arm) or contrast_colour(arm)
            col[i].plot([x] * len(y), y, '.' if i < 3 else '-', color=c, ms=4, alpha=.5)
            style = dict(marker='s' if attn == 'gqa' else 'o', color=c, ms=5, mfc=c if i < 3 else 'white', ls='')
            names.setdefault(plain(arm), *col[i].plot(x, mean(y) if i < 3 else y[0], **style))
        col[0].set_title(exp['name'], weight='bold')
    for i, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(('' if i < 3 else 'Δ ') + ('loss gap (nats)', 'score P', 'probe acc.')[i % 3])
    for ax in axes[3:].flat:
        ax.axhline(0, color=GREY, lw=.8, zorder=0)
    ax.set_xticks(range(len(ticks)), map(plain, ticks))
    fig.legend(names.values(), names, loc='outside lower center', ncols=6, frameon=False, handletextpad=.2)
    return save(fig, cfg, a, f'compare_{b["name"]}')

def main(cfg):
    if len(cfg.paths) not in (1, 2):
        raise SystemExit('plot.py takes one experiment folder, or two to compare: plot.py out/demo [out/other]')
    exps, one = [load(path) for path in cfg.paths], len(cfg.paths) == 1
    for exp in exps:
        if not any(r['ana'] or (r['log'] and one) for r in exp['runs']):
            raise SystemExit(f'{exp["folder"]} holds no analysis.json yet: train and analyze a run first')
    ana = lambda key: [r for r in exp['runs'] if r['ana'] and r['ana'].get(key)]
    unkept = lambda key: [r for r in ana(key) if r['stage'] in ('rope', 'drope')]
    has_topics = lambda r: any(sum(row.get('topics') or []) for row in r['log'])
    figures = {plot_loss: [r for r in exp['runs'] if len(curve([r], 'val_loss')[0])],
               plot_order: [r for r in exp['runs'] if r['stage'] == 'rope' and has_topics(r)],
               plot_scores_p: [r for r in ana('heads') if 'score_p' in r['ana']['heads']],
               plot_maps: unkept('maps'), plot_probe: ana('probe'), plot_distance: ana('probe'),
               plot_spectra: unkept('circuits'), plot_effects: exp['effects']}
    paths = [f(cfg, exp, data) for f, data in figures.items() if data] if one else [plot_compare(cfg, *exps)]
    print('\n'.join(paths))
    return paths

if __name__ == '__main__':
    main(configure(__file__, positional=True))
