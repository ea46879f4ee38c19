"""
Figures of an experiment, from its JSON files alone: no model is loaded and nothing is computed again.

    python plot.py out/structured             # every figure -> out/structured/figures/; or results/structured
    python plot.py out/structured out/wiki    # the two side by side, in one figure

What is missing is left out: a run without analysis.json, a reference loss that is null, an arm that never ran.
"""
import base64, glob, itertools, json, os, re, textwrap, zlib

import numpy as np
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.lines import Line2D
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
SPARE = ['#CC79A7', '#E69F00', '#56B4E9', '#000000']                               # up to four more orders
SCALES = {'shuffled': ('Blues', .5, .5), 'topic': ('inferno', .12, .88), 'pseudo': ('Greens', .55, .95)}  # beyond
MANY = 6                                       # with more orders than this: thinner lines and smaller panels
TOPICS = ['#77AADD', '#EE8866', '#EEDD88', '#44BB99', '#FFAABB', '#BBCC33', '#99DDFF', '#AAAA00']  # Tol's light
MEASURES = {'score_p': ('score P', 'log ratio'), 'score_o': ('score O', 'log ratio'),
            'probe': ('topic probe', 'accuracy'), 'val_loss': ('validation loss', 'nats per token'),
            'within': ('within-topic attention', 'share'), 'entropy': ('attention entropy', 'nats')}
GREY, BAR = '#666666', dict(aspect=30, fraction=.03, pad=.015)  # BAR: a slim colour bar
NOTES = {r'_c\d': '×4: four rounds of the topics.', '_cd': 'cd20: the last 20% shuffled (cd5: 5%).',
         '_pure': 'pure: one segment a window.'}          # added to captions where an order is named so
CAPTIONS = {
    'loss': ('Loss', 'Bold: validation. Faint, with few orders: training, first seed. Dashed: RoPE kept, '
             'dotted: dropped.'),
    'order': ('Order of the training rows', 'Share of each dominant topic (a colour) in the rows, first seed. The '
              'last epoch is cut to what the steps need.'),
    'scores_p': ('Score P of every head', '0: position alone decides. Above: same topic or segment attracts.'),
    'scores_o': ('Score O of every head, in null SDs', 'z of attention to the same topic in other segments. '
                 'Grey: |z| < 1.96, chance for one head.'),
    'maps': ('The most and the least topical head', 'One validation row, first seed. Strips: topics of queries '
             '(left) and keys (below). L2H1: layer 2, head 1, from 0; P on the rows that chose it.'),
    'probe': ('Topic in the residual stream', 'Linear probe. Token: the token alone; running mean: of embeddings; '
              'untrained: at init; Bayes filter: ceiling; bag: of the tokens so far.'),
    'words': ('What two heads read', 'Attention of the last token of a validation row (first seed, RoPE) to every '
              'token before it; darker: more. Bars under the words: topics.'),
    'clusters': ('The topics', 'Embeddings of a sample of articles in two dimensions (t-SNE, which keeps neighbours, '
                 'not distances); a colour is a topic of K-means.'),
    'distance': ('How soon the topic is known', 'Linear probe after the last layer. The Bayes filter, best overall, '
                 'still expects the old topic right after a boundary.'),
    'spectra': ('Singular values over the largest', 'Mean over heads, first seed. Solid: RoPE, dotted: DroPE; '
                'grey: at init, where the analysis has it.'),
    'effects': ('Paired effects of the order', 'Bars: 95% interval, p: sign flips, unadjusted. Shaded: primary.'),
    'matched': ('At equal loss', 'Above: a line is a seed through its lengths of recalibration, larger dots: longer. '
                'Below, under DroPE: an arm minus shuffled (dashed: minus pseudo). Bands, with few orders: 95% '
                'interval.'),
    'factors': ('What about the order matters', 'Effect of topic order on what dropping RoPE changes: (topic − '
                'shuffled) DroPE minus kept. Cooldown: last share of training, shuffled. Bars: 95% interval.'),
    'circuits': ('Rank and alignment of circuits', 'Mean over heads. Alignment: how much of the top singular '
                 'directions, of what keys read (QK) or heads write (OV), lies in what the topic probe there reads.'),
    'lens': ('What the own topic\'s tokens contributed', 'Share of the hidden state (of the logit), exact and linear, '
             'where another topic came before. Chance: labels of other rows. Other tokens: all but the position\'s '
             'own. Bands: 2 SD of chance. Faint: seeds.'),
    'strip': ('One logit, token by token', 'Signed contributions to the logit of the correct next token (above the '
              'mean logit) along a validation row, first seed. Colours: topics. Numbers: sums of runs. The own token, '
              'and bars far longer than the rest, are cut off.'),
    'ablation': ('Ablating heads', 'Loss far from a boundary minus near it, over that of the whole model. Above 0: the '
                 'heads carried what is known of the topic. Faint: seeds, topical heads.'),
    'forgetting': ('Forgetting between visits', 'Validation loss of a topic minus its loss in the shuffled arm at the '
                   'same step, by steps since it was last in the training rows.'),
    'recovery': ('How fast the loss recovers', 'Steps of the longest recalibration until the loss comes so close to '
                 'the Bayes filter. Faint: seeds; bold: their mean, where all of them do. Arms that never left it are '
                 'not drawn.'),
    'free': ('What positions alone explain', 'A dot is a head of a seed: overlap of its attention with the best '
             'content-free pattern, against that with its mean pattern, the ceiling.'),
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
    """
    A folder -> {name, folder, refs, colour, runs: [{attn, order, stage, seed, log, ana, lens}], rows: the same of every
    recalibration length, from the summary, and lists of it: effects, matched, recovery, forgetting}.
    """
    if not os.path.isdir(folder):
        raise SystemExit(f'{folder}: no such folder; give an experiment folder such as out/demo')
    runs = []
    for path in glob.glob(f'{glob.escape(folder)}/*/seed*'):
        condition, seed = path.replace(os.sep, '/').rsplit('/seed', 1)
        arm = split(os.path.basename(condition))
        if arm and seed.isdigit():
            log = [row for row in read(f'{path}/log.jsonl') or [] if 'step' in row]
            runs.append(dict(**arm, seed=int(seed), log=log, ana=read(f'{path}/analysis.json'),
                             lens=read(f'{path}/lens.json')))
    runs.sort(key=lambda r: (r['seed'], r['attn'] != 'mha', factors(r['order']), [*STAGES].index(r['stage'])))
    summary = read(f'{folder}/summary.json') or {}
    refs = summary.get('references') or next((r['ana']['references'] for r in runs if r['ana']), None) or {}
    n, rows = len({r['seed'] for r in runs}), lambda key: [
        r | (split(r['condition']) or split(r['condition'] + '_rope')) for r in summary.get(key) or []]
    orders = present(runs, 'order')
    notes = [note for key, note in NOTES.items() if any(re.search(key, o) for o in orders)]
    return dict(name=os.path.basename(os.path.abspath(folder)), folder=folder, runs=runs,
                seeds=' '.join([f'n={n} seeds.' if n > 1 else 'One seed (n=1: no interval).', *notes]),
                effects=[e for e in summary.get('effects', []) if e['mean'] is not None],
                matched=summary.get('matched') or [], rows=rows('runs'), recovery=rows('recovery'),
                forgetting=rows('forgetting'), layer=summary.get('n_layer', 0) // 2, many=len(orders) > MANY,
                refs={k: v for k, v in refs.items() if v is not None}, colour=colours(orders))

def split(condition):
    """'mha_topic_c4_drope' -> {attn, order, stage}; None of another name."""
    m = re.fullmatch(r'([a-z]+)_(\w+)_([a-z]+)', condition)
    return dict(zip(('attn', 'order', 'stage'), m.groups())) if m and m[3] in STAGES else None

def factors(order):
    """What an order varies, sorted as figures show it: (pure windows, family, cycles, % shuffled at the end)."""
    m = re.fullmatch(r'(shuffled|topic|pseudo)(?:_ordered)?(?:_c(\d+))?(?:_cd(\d+))?(_pure)?', order)
    if not m:
        return False, (len(SCALES), order), 1, 0
    return bool(m[4]), ([*SCALES].index(m[1]), m[1]), int(m[2] or 1), int(m[3] or 0)

def colours(orders):
    """A colour of every order: fixed ones, spare ones for four more; beyond, a scale per family, by cycles."""
    extra = sorted((o for o in orders if o not in ORDERS), key=lambda o: (*factors(o)[1:], o))
    if len(extra) <= len(SPARE):
        return dict(zip(extra, SPARE), **ORDERS)
    families, shades = [factors(o)[1][1] for o in extra], {}
    for family in dict.fromkeys(families):
        scale, low, high = SCALES.get(family, ('Greys', .5, .9))
        peers = [o for o, f in zip(extra, families) if f == family]
        shades |= {o: plt.get_cmap(scale)(c) for o, c in zip(peers, np.linspace(low, high, len(peers)))}
    return shades | ORDERS

def pick(runs, **kw):
    return [r for r in runs if all(r[k] == v for k, v in kw.items())]

def present(runs, key):
    """The values of a key in these runs, in the order in which figures show them."""
    rank = {'attn': lambda k: k != 'mha', 'order': factors, 'stage': [*STAGES].index}[key]
    return sorted({r[key] for r in runs}, key=rank)

def chosen(cfg, runs):
    """The orders of map_orders that these runs have, else their first two: for figures that can't show them all."""
    return [o for o in present(runs, 'order') if o in cfg.map_orders] or present(runs, 'order')[:2]

def mean(values):
    """Mean over the first axis of what is defined (null in the JSON is not); NaN where nothing is."""
    return np.ma.filled(np.ma.masked_invalid(np.array(values, float)).mean(0), np.nan)

# -----------------------------------------------------------------------------
# drawing

def plain(text, long=False):
    """
    Names as figures write them: 'mha topic_ordered - shuffled, drope' -> 'MHA topic − shuffled, DroPE'; of an order
    alone, long: 'topic_c4_cd20' -> 'topic ×4, 20% shuffled at the end'.
    """
    if long:
        text = re.sub(r'_cd(\d+)', r', \1% shuffled at the end', text).replace('_pure', ', pure windows')
    text = re.sub(r'_c(\d+)', r' ×\1', text).replace('_ordered', '').replace('_', ' ').replace(' - ', ' − ')
    names = {'mha': 'MHA', 'gqa': 'GQA', **{k: v[0] for k, v in STAGES.items()}}
    return re.sub(r'\w+', lambda m: names.get(m[0], m[0]), text)

def canvas(cfg, exp, name, rows, cols, height, **kw):
    """A figure of rows x cols panels, `height` inches a row, with a headline and a line on how to read it."""
    plt.rcParams.update({'font.size': 9, 'axes.titlesize': 9.5, 'axes.titlelocation': 'left',
        'axes.linewidth': .7, 'axes.edgecolor': '#999999', 'axes.spines.top': False, 'axes.spines.right': False,
        **{f'{x}tick.{k}': v for x in 'xy' for k, v in {'color': '#999999', 'labelcolor': '#333333'}.items()}})
    title, sub = CAPTIONS[name]
    seeds = ('' if name in ('matched', 'free') or exp['seeds'][:2] != 'n=' else 'Mean of ') + exp['seeds']
    sub = textwrap.wrap(sub + (name not in ('order', 'maps', 'words', 'clusters', 'spectra', 'strip')) * f' {seeds}',
                        int(15.2 * cfg.fig_width))
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

def tall(least, labels):
    """Inches of a panel with so many labels at its end."""
    return max(least, .62 + .17 * labels)

def side_name(ax, text, c, level=False):
    ax.annotate(text, (0, .5), (-26 if level else -36, 0), 'axes fraction', 'offset points', va='center', color=c,
                rotation=0 if level else 90, ha='right' if level else 'center', weight='bold')

def legend(fig, entries):
    """Below the panels, {name: style of a line}; as many columns as the longest name leaves room for."""
    lines = [Line2D([], [], **{'lw': 1.6, 'color': GREY, **style}) for style in entries.values()]
    fig.legend(lines, entries, loc='outside lower center', frameon=False, handletextpad=.5,
               ncols=int(np.clip(95 // (max(map(len, entries)) + 6), 1, 6)))

def looks(exp, rows, stages=True):
    """Entries of a legend: the orders of these rows, by colour, and the stages, by line."""
    entries = {plain(o): {'color': exp['colour'][o]} for o in present(rows, 'order')}
    return entries | {STAGES[s][0]: {'ls': STAGES[s][1]} for s in present(rows, 'stage') if stages}

def fill(axes, keys, have):
    """[(panel, key)] of the keys that there is data for; the other panels are hidden."""
    keys = [*keys, *[None] * axes.size][:axes.size]
    for ax, key in zip(axes.flat, keys):
        ax.set_visible(key in have)
    return [(ax, key) for ax, key in zip(axes.flat, keys) if key in have]

def outer(axes):
    """Labels and tick labels at the left, and below the last panel of each column that is shown."""
    for i, j in np.ndindex(axes.shape):
        last = i + 1 == len(axes) or not axes[i + 1, j].get_visible()
        axes[i, j].tick_params(labelbottom=last, labelleft=j == 0)
        axes[i, j].set(xlabel=axes[i, j].get_xlabel() * last, ylabel=axes[i, j].get_ylabel() * (j == 0))

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
    labels = len(present(runs, 'order')) * (2 - exp['many']) + len(exp['refs'])
    fig, axes = canvas(cfg, exp, 'loss', len(attns), len(shown), tall(2.7, labels))
    for ax, (attn, phase) in fill(axes, [(a, p) for a in attns for p in shown], have):
        refs, ends, seen = exp['refs'], [], [y for k, y in exp['refs'].items() if k == 'filter']
        for order, stage in ((o, s) for o in present(runs, 'order') for s in phases[phase]):
            group, c = pick(runs, attn=attn, order=order, stage=stage), exp['colour'][order]
            x, y = curve(group, 'val_loss')
            if len(x):
                if not exp['many']:
                    ax.plot(*curve(group[:1], 'loss'), color=c, lw=.8, alpha=.22, zorder=1)
                ax.plot(x, y, STAGES[stage][1], color=c, lw=1.1 if exp['many'] else 1.8, zorder=3)
                if not (exp['many'] and stage == 'kept'):
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
    orders, cols = present(runs, 'order'), 1 + exp['many']
    fig, axes = canvas(cfg, exp, 'order', -(-len(orders) // cols), cols, .95, sharex=True)
    for ax, order in fill(axes, orders, orders):
        log = [row for row in pick(runs, order=order)[0]['log'] if sum(row.get('topics') or [])]
        x, share = [row['step'] for row in log], np.array([row['topics'] for row in log], float).T
        ax.stackplot(x, share / share.sum(0), colors=TOPICS, step='pre', lw=.3, edgecolor='white')
        ax.set(xlim=(x[0], x[-1]), ylim=(0, 1), yticks=[0, 1], yticklabels=['0', '100%'], xlabel='training steps')
        ax.set_title(plain(order, long=True), color=exp['colour'][order], weight='bold')
    outer(axes)
    return save(fig, cfg, exp, 'order')

def plot_scores_p(cfg, exp, runs, name='scores_p'):
    # one extreme head should not pale the others; below the least range it is all noise, and should look it
    key, label, least, digits = {'scores_p': ('score_p', 'P (log ratio)', .1, 2),
                                 'scores_o': ('o_z', 'z of O', 4, 1)}[name]
    grids, many = {}, exp['many']
    for r in runs:
        grids.setdefault((r['attn'], r['order'], r['stage']), []).append(r['ana']['heads'][key])
    grids, stages = {k: mean(g) for k, g in grids.items()}, present(runs, 'stage')
    arms = [(a, o) for a in present(runs, 'attn') for o in present(pick(runs, attn=a), 'order')]
    L, H = next(iter(grids.values())).shape
    v = max(least, np.nanpercentile(np.abs([*grids.values()]), 99))
    digits, scale = digits + (v < .1), plt.get_cmap('PuOr_r')(np.linspace(0, 1, 512))
    if name == 'scores_o':
        scale[np.abs(np.linspace(-v, v, 512)) < 1.96] = plt.cm.colors.to_rgba('#e2e2e2')
    fig, axes = canvas(cfg, exp, name, len(arms), len(stages), .72 if many else np.clip(.47 + .24 * L, 1.3, 2.4))
    for ax, (a, o, s) in fill(axes, [(*arm, s) for arm in arms for s in stages], grids):
        g = grids[a, o, s]
        image = ax.imshow(g, cmap=ListedColormap(scale), vmin=-v, vmax=v, aspect='auto')
        for l, h in np.ndindex(L, H) if L * H <= 32 and not many else ():  # where numbers have room
            p = round(g[l, h], digits) + 0                                 # + 0: no minus before zero
            ax.text(h, l, '–' if np.isnan(p) else f'{p:.{digits}f}', ha='center', va='center',
                    color='white' if abs(g[l, h]) > .6 * v else '#333333')
        ax.set(title=f'{STAGES[s][0]}, mean {mean(g.ravel()):.{digits + 1}f}', facecolor='#dddddd', xlabel='head',
               ylabel='layer', xticks=range(0, H, 1 + H // 13), yticks=range(0, L, 1 + L // (4 if many else 13)))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if s == stages[0]:
            side_name(ax, plain(f'{a} {o}').replace(' ', '\n', many), exp['colour'][o], level=many)
        ax.label_outer()
    fig.colorbar(image, ax=axes, label=label, extend='both', **BAR)
    return save(fig, cfg, exp, name)

def plot_scores_o(cfg, exp, runs):
    return plot_scores_p(cfg, exp, runs, name='scores_o')

def plot_maps(cfg, exp, runs):
    runs, panels = pick(runs, attn=present(runs, 'attn')[0]), {}
    orders = chosen(cfg, runs)
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

def plot_words(cfg, exp, runs):
    words = runs[0]['ana']['words']
    size, wide = 5.6, int((cfg.fig_width - .3) * 72 / (.602 * 5.6))             # monospace: .602 em a letter
    text = [''.join('¶' if c == '\n' else c if ord(c) < 0x500 else '·' for c in t) or '·' for t in words['tokens']]
    at, row, col = [], 0, 0
    for t in text:
        if col + len(t) > wide:
            row, col = row + 1, 0
        at.append((row, col))
        col += len(t)
    fig, axes = canvas(cfg, exp, 'words', len(words['heads']), 1, .155 * (row + 1) + .35)
    for ax, h in zip(axes.flat, words['heads']):
        top = max(np.sort(h['weights'][1:])[-8:][0], 1e-9)                      # a few may be darker than the scale
        for (r, c), t, w, z in zip(at, text, h['weights'], words['topics']):
            ax.add_patch(plt.Rectangle((c, r - .45), len(t), .78, lw=0, color='#D55E00',
                                       alpha=min(1, w / top) ** .7 * .85))
            ax.add_patch(plt.Rectangle((c, r + .33), len(t), .13, lw=0, color=TOPICS[z % len(TOPICS)]))
            ax.text(c, r, t, family='monospace', size=size, va='center', color='#222222', parse_math=False)
        p = 'undefined' if h['score_p'] is None else f'{h["score_p"]:.3f}'
        ax.set(xlim=(0, wide), ylim=(row + .6, -.6), title=f'{h["which"]}: L{h["layer"]}H{h["head"]}, P = {p}')
        ax.axis('off')
    return save(fig, cfg, exp, 'words')

def plot_clusters(cfg, exp, clusters):
    x, y, z = np.array(clusters['picture']).T
    fig, axes = canvas(cfg, exp, 'clusters', 1, 1, 5.2)
    ax, total = axes[0, 0], sum(clusters['sizes'])
    for k, words in enumerate(clusters['words']):
        mine = z == k
        ax.scatter(x[mine], y[mine], s=7, lw=0, color=TOPICS[k % len(TOPICS)])
        ax.scatter([], [], s=30, color=TOPICS[k % len(TOPICS)], label=f'{clusters["sizes"][k] / total:.0%} '
                   + ', '.join(words[:4]))
    ax.axis('off')
    fig.legend(loc='outside lower center', frameon=False, handletextpad=.2, ncols=2)
    return save(fig, cfg, exp, 'clusters')

def plot_probe(cfg, exp, runs, name='probe'):
    attns, stages, first = present(runs, 'attn'), present(runs, 'stage'), runs[0]['ana']['probe']
    L = len(first['accuracy']) - 1
    ticks, get, named = range(L + 1), lambda p: p['accuracy'], []
    refs = {'majority': 'majority', 'token': 'token', 'untrained': 'init', 'running mean': 'running_mean',
            'bag of tokens': 'bag', 'Bayes filter': 'ceiling'}
    if name == 'distance':
        ticks, get, refs = first['distance'], lambda p: p['by_distance'][L], {'Bayes filter': 'ceiling_by_distance'}
    fig, axes = canvas(cfg, exp, name, len(attns), len(stages),
                       tall(2.5, len(present(runs, 'order')) + len(refs)), sharey=True)
    for ax, (attn, stage) in fill(axes, [(a, s) for a in attns for s in stages],
                                  {(r['attn'], r['stage']) for r in runs}):
        group, ends = pick(runs, attn=attn, stage=stage), []
        lines = [(label, GREY, [r['ana']['probe'].get(k) for r in group]) for label, k in refs.items()]
        lines += [(o, exp['colour'][o], [get(r['ana']['probe']) for r in pick(group, order=o)])
                  for o in present(group, 'order')]
        for label, c, y in lines:
            y = [max(v.values()) if isinstance(v, dict) else v for v in y if v is not None]  # the best running mean
            if not y:
                continue
            y, bold = np.array([np.broadcast_to(np.array(v, float), len(ticks)) for v in y]), c != GREY
            ax.plot(y.T, color=c, lw=.7 * bold * (not exp['many']), alpha=.3)
            y = mean(y)
            ax.plot(y, 'o-' if bold else '-', color=c, zorder=2 + bold, ms=2 if exp['many'] else 3.5,
                    lw=.9 if exp['many'] or not bold else 1.8)
            ends += [(v, plain(label), c) for v in y[np.isfinite(y)][-1:]]
        ax.set(ylim=(0, 1.02), title=plain(f'{attn}, {stage}'), ylabel='probe accuracy',
               xlabel='layers passed' if name == 'probe' else 'tokens since the boundary')
        ax.set_xticks(range(len(ticks)), ticks, fontsize=6.5 if len(ticks) > 7 and len(stages) > 2 else None)
        ax.label_outer()
        if stage == present(pick(runs, attn=attn), 'stage')[-1]:
            end_labels(ax, ends)
            named.append(len(present(group, 'order')))
    if min(named) < len(present(runs, 'order')):            # a last panel has not all of them
        legend(fig, looks(exp, runs, stages=False))
    return save(fig, cfg, exp, name)

def plot_distance(cfg, exp, runs):
    return plot_probe(cfg, exp, runs, name='distance')

def plot_spectra(cfg, exp, runs):
    runs = pick(runs, attn=present(runs, 'attn')[0])
    runs = pick(runs, seed=runs[0]['seed'])                 # the first: of others spectra are not published
    orders = chosen(cfg, runs)
    L = len(runs[0]['ana']['circuits']['ov'])
    shades = ListedColormap([plt.cm.viridis(.92 * l / max(1, L - 1)) for l in range(L)])
    fig, axes = canvas(cfg, exp, 'spectra', len(orders), 2, 2.3, sharey=True)
    for ax, (order, name) in zip(axes.flat, ((o, c) for o in orders for c in ('QK at distance 0', 'OV'))):
        for r in pick(runs, order=order):
            c = r['ana']['circuits']
            for l, s in enumerate(np.array(c['ov'] if name == 'OV' else c['qk']['0'], float)):     # [head, k]
                y = (s / s.max(-1, keepdims=True)).mean(0)
                ax.plot(range(1, len(y) + 1), y, STAGES[r['stage']][1], lw=1.5, color=shades(l))
            if r['stage'] == 'rope' and c.get('init_spectra'):     # analyses before 2026-11-25 have none
                y = c['init_spectra'][name[:2].lower()]
                ax.plot(range(1, len(y) + 1), y, color=GREY, lw=1, zorder=0)
        ax.set(title=plain(f'{runs[0]["attn"]} {order}: ') + name, xlabel='rank', ylabel='value', ylim=(0, 1.02))
        ax.label_outer()
    image = plt.cm.ScalarMappable(plt.Normalize(-.5, L - .5), shades)
    fig.colorbar(image, ax=axes, label='layer', ticks=range(L), **BAR)
    return save(fig, cfg, exp, 'spectra')

def plot_circuits(cfg, exp, runs):
    get = {'QK rank': lambda c, d: c['qk_rank'].get(d), 'OV rank': lambda c, d: c['ov_rank'] if d == '0' else None,
           'QK alignment': lambda c, d: c['alignment']['key'].get(d),
           'OV alignment': lambda c, d: c['alignment']['written'] if d == '0' else None}
    orders = chosen(cfg, runs) if exp['many'] else present(runs, 'order')
    runs = [r for r in runs if r['order'] in orders]
    attns, shades, L = present(runs, 'attn'), {'0': 1, '1': .6, '16': .3}, len(runs[0]['ana']['circuits']['ov_rank'])
    fig, axes = canvas(cfg, exp, 'circuits', 2 * len(attns), 2, 2.1, sharex=True, sharey='row')
    for ax, (attn, name) in zip(axes.flat, itertools.product(attns, get)):
        group, aligned = [r | r['ana']['circuits'] for r in pick(runs, attn=attn)], 'alignment' in name
        layers = lambda found: mean(mean([np.array(f, float).T for f in found]))   # [seed][layer][head] -> [layer]
        for d, order, stage in itertools.product(shades, present(group, 'order'), ('rope', 'drope')):
            found = [f for f in (get[name](c, d) for c in pick(group, order=order, stage=stage)) if f]
            if found:
                ax.plot(layers(found), STAGES[stage][1], color=exp['colour'][order], alpha=shades[d], marker='o',
                        ms=2.5, lw=1.1 if exp['many'] else 1.5)
        init = layers([get[name](c['init'], '0') for c in group])
        ax.plot(init, color=GREY, lw=1, zorder=0)
        if aligned:
            ax.axhline(group[0]['alignment']['chance'], color=GREY, lw=1, ls=(0, (1, 1.5)), zorder=0)
        ax.set(title=plain(f'{attn}, {name}'), xlabel='layer', xticks=range(0, L, 1 + L // 13),
               ylabel='share' if aligned else 'effective rank')
        ax.label_outer()
    for ax in axes[:, 0]:
        ax.set_ylim(0)
    legend(fig, looks(exp, runs) | {'at init': {'lw': 1}, 'chance': {'lw': 1, 'ls': (0, (1, 1.5))}} | {
        f'distance {d}': {'color': '#000000', 'alpha': alpha} for d, alpha in shades.items()})
    return save(fig, cfg, exp, 'circuits')

def plot_lens(cfg, exp, runs):
    attns, stages, L = present(runs, 'attn'), present(runs, 'stage'), len(runs[0]['lens']['depths']) - 3
    logit = L + 1 + L // 12                                 # where it is drawn, clear of the last layer
    fig, axes = canvas(cfg, exp, 'lens', 2 * len(attns), len(stages), 2.1, sharex=True, sharey='row')
    panels = list(itertools.product(attns, (False, True), stages))
    for ax, (attn, above, stage) in fill(axes, panels, [p for p in panels if pick(runs, attn=p[0], stage=p[2])]):
        for order in present(pick(runs, attn=attn, stage=stage), 'order'):
            lenses = [r['lens'] for r in pick(runs, attn=attn, order=order, stage=stage)]
            found = [l['within'][l['gate']]['projection_others' if above else 'projection'] for l in lenses]
            y, chance = (np.array([f[k] for f in found], float) for k in ('value', 'chance'))      # [seed, L + 3]
            spread = mean([f['chance_sd'] or [np.nan] * (L + 3) for f in found])[:L + 1]
            if above:
                y, chance = y - chance, 0 * chance
            c, middle = exp['colour'][order], mean(chance)[:L + 1]
            ax.plot(y[:, :L + 1].T, color=c, lw=.7 * (not exp['many']), alpha=.3)
            ax.plot(mean(y)[:L + 1], 'o-', color=c, lw=.9 if exp['many'] else 1.8, ms=2 if exp['many'] else 3.5,
                    zorder=3)
            ax.plot(middle, color=GREY if above else c, lw=.8, zorder=2)
            ax.fill_between(range(L + 1), middle - 2 * spread, middle + 2 * spread, color=c, lw=0,
                            alpha=.15 * (not exp['many']))
            ax.plot(logit, mean(y)[-1], 'D', color=c, ms=4, zorder=3)
            ax.plot(logit, mean(chance)[-1], 'D', color=GREY if above else c, ms=4, mfc='white', mew=.8)
        ax.set(xlim=(-.2, logit + .3), title=plain(f'{attn}, {stage}'), xlabel='layers passed',
               ylabel='above chance,\nother tokens' if above else 'share,\nall tokens')
        if not above:
            ax.set_ylim(0, 1.04)
        elif max(map(abs, ax.get_ylim())) > .3:             # one arm far off would flatten all the others
            ax.set_yscale('symlog', linthresh=.05, linscale=1.5)
            ax.set_yticks((-.05, 0, .05, .5), ('−0.05', '0', '0.05', '0.5'))
            ax.minorticks_off()
            ax.set_ylabel('above chance,\nother tokens\n(log from 0.05)')
        ax.set_xticks([*range(0, L + 1, 1 + L // 6), logit], [*range(0, L + 1, 1 + L // 6), 'logit'])
        ax.label_outer()
    mark = {'marker': 'D', 'ls': '', 'ms': 4}
    legend(fig, looks(exp, runs, stages=False) | {'own topic': {'marker': 'o', 'ms': 3.5}, 'chance': {'lw': .8},
                                                  'of the logit': mark, 'chance there': mark | {'mfc': 'white'}})
    return save(fig, cfg, exp, 'lens')

def plot_strip(cfg, exp, runs):
    runs = pick(runs, attn=present(runs, 'attn')[0])
    orders = chosen(cfg, runs)
    first = {(r['order'], r['stage']): r['lens'] for r in reversed(runs) if r['order'] in orders}  # the first seed's
    arms = [k for k in itertools.product(orders, STAGES) if k in first]
    fig, axes = canvas(cfg, exp, 'strip', len(arms), 1, 1.15, sharex=True, sharey=True)
    shown = np.concatenate([l['strip']['contribution'][l['gate']][:-1] + [1e-3] for l in first.values()])
    top = min(np.abs(shown).max(), 5 * np.quantile(np.abs(shown), .99))
    bottom = min(-.2 * top, 1.1 * max(shown.min(), -top))
    for ax, (order, stage) in zip(axes.flat, arms):
        strip = first[order, stage]['strip']
        y, z = np.array(strip['contribution'][first[order, stage]['gate']]), np.array(strip['topics']) % len(TOPICS)
        ax.bar(range(len(y)), y, width=1, color=np.array(TOPICS)[z])
        ax.axhline(0, color=GREY, lw=.6)
        edges = [0, *np.flatnonzero(np.diff(z)) + 1, len(z)]
        for a, b in zip(edges, edges[1:]):
            ax.text((a + b - 1) / 2, 1.25 * top, f'{round(y[a:b].sum(), 2) + 0:+.2f}', ha='center', va='center',
                    fontsize=8)
        inset = ax.inset_axes([0, -.1, 1, .09])
        inset.imshow(z[None], cmap=ListedColormap(TOPICS), vmin=0, vmax=len(TOPICS) - 1, aspect='auto')
        inset.set_axis_off()
        ax.set(xlim=(-.5, len(z) - .5), ylim=(bottom, 1.45 * top), ylabel='nats')
        ax.set_title(plain(f'{runs[0]["attn"]} {order}, {stage}: logit {strip["logit"]:+.2f}, own token {y[-1]:+.2f}'),
                     color=exp['colour'][order])
        ax.tick_params(axis='x', length=0, pad=7)
    ax.set_xlabel('position')
    return save(fig, cfg, exp, 'strip')

def contrast_colour(exp, name):
    """Of a paired difference 'topic_c4 - shuffled': the first arm's, dark where the second is not shuffled."""
    arm, other = name.split(' - ')
    return exp['colour'].get(arm.split()[-1], '#333333') if other.startswith('shuffled') else '#333333'

def plot_effects(cfg, exp, effects):
    effects = {(e['measure'], *e['contrast'].rsplit(', ', 1)): e for e in effects}
    groups = [*dict.fromkeys(k[1] for k in effects)]
    whats = ['', *STAGES, 'drope - kept'] if len(groups) <= MANY else ['drope - kept']  # '': headline of a group
    rows = [(g, w) for g in groups for w in whats if not w or any(k[1:] == (g, w) for k in effects)]
    measures = [m for m in MEASURES if any(k[0] == m for k in effects)]
    n, cols = max(e['n'] for e in effects.values()), min(3, len(measures))
    fig, axes = canvas(cfg, exp, 'effects', -(-len(measures) // cols), cols, .6 + .2 * len(rows), sharey=True)
    for ax, m in fill(axes, measures, measures):
        ax.axvline(0, color=GREY, lw=.8)
        for y, (group, what) in ((y, r) for y, r in enumerate(rows) if (m, *r) in effects):
            e, c = effects[m, group, what], contrast_colour(exp, group)
            ax.plot(e['mean'], y, 'D' if ' - ' in what else 'o', color=c, ms=5.5)
            if e['low'] is not None:
                ax.plot([e['low'], e['high']], [y, y], color=c, lw=1.6)
                ax.text(1.02, y, f'p {e["p"]:.3f}' + (f', n={e["n"]}' if e['n'] < n else ''), va='center',
                        transform=ax.get_yaxis_transform())
            if e.get('primary'):
                ax.axhspan(y - .45, y + .45, color='#f3e3b5', lw=0, zorder=0)
        ax.set(ylim=(len(rows) - .4, -.6), title=MEASURES[m][0],
               xlabel=MEASURES[m][1] + ', DroPE − kept' * ('' not in whats))
        ax.set_yticks(range(len(rows)), [plain(what if '' in whats and what else group) for group, what in rows])
        ax.tick_params(axis='y', length=0)
        ax.locator_params(axis='x', nbins=4)
        ax.margins(x=.1)
        plt.setp([t for t, (_, what) in zip(ax.get_yticklabels(), rows) if not what], weight='bold')
    return save(fig, cfg, exp, 'effects')

def plot_matched(cfg, exp, matched):
    attns, lengths = present(exp['rows'], 'attn'), sorted({r['recal_steps'] or 0 for r in exp['rows']})
    get = {'score_p': lambda r: r['score_p'], 'probe': lambda r: r['probe'][exp['layer']]}
    many, bayes = exp['many'], 'filter' in exp['refs']
    fig, axes = canvas(cfg, exp, 'matched', 2 * len(attns), 2, 2.4)
    for (attn, m), top, low in zip(itertools.product(attns, get), axes[::2].flat, axes[1::2].flat):
        lines, label = {}, MEASURES[m][0]
        for r in sorted(pick(exp['rows'], attn=attn), key=lambda r: r['recal_steps'] or 0):
            lines.setdefault((r['order'], r['stage'], r['seed']), []).append(r)
        for (order, stage, _), rows in lines.items():
            x, y = [r['excess'] for r in rows], np.array([get[m](r) for r in rows], float)
            size = [(2 + 5 * lengths.index(r['recal_steps'] or 0) / len(lengths)) ** 2 for r in rows]
            style = dict(color=exp['colour'][order], alpha=.45 if many else .7)
            if stage in ('rope', 'nope'):
                top.scatter(x, y, s=34, marker='D' if stage == 'rope' else 's', ec='white', lw=.6, zorder=4, **style)
            else:
                top.plot(x, y, STAGES[stage][1], lw=.9, **style)
                top.scatter(x, y, s=size if stage == 'drope' else 3, lw=0, zorder=3, **style)
        for d in (d for d in matched if (d['attention'], d['measure']) == (attn, m) and d['seeds']):
            whole = np.array(d['n']) == d['seeds']           # where seeds drop out the mean jumps
            y, lo, hi = (np.where(whole, np.array(d[k], float), np.nan) for k in ('mean', 'low', 'high'))
            c, dash = exp['colour'].get(d['arms'][0], GREY), '-' if d['arms'][1].startswith('shuffled') else '--'
            low.plot(d['loss'], y, dash, color=c, lw=1.1 if many else 1.6)
            low.fill_between(d['loss'], lo, hi, color=c, lw=0, alpha=.13 * (not many))
        low.axhline(0, color=GREY, lw=.8, zorder=0)
        x, grid = [r['excess'] for r in exp['rows']], [x for d in matched for x in d['loss']]
        if bayes:  # logarithmic from 0.01 nats on: kept and dropped lie far apart
            for ax, ticks in ((top, (0, .01, .1, 1)), (low, (0, .01, .02, .05, .1, .2, .5, 1, 2))):
                ax.set_xscale('symlog', linthresh=.01, linscale=.5)
                ax.set_xticks(ticks, [f'{x:g}' for x in ticks])
                ax.minorticks_off()
            top.axvline(0, color=GREY, lw=.8, zorder=0)
            top.set_xlim(min(*x, -.001), 1.2 * max(x))
            if grid:
                low.set_xlim(.93 * min(grid), 1.07 * max(grid))
        else:
            low.locator_params(axis='x', nbins=5)
        low.set(title=f'difference in {label}', ylabel=MEASURES[m][1],
                xlabel='loss above the Bayes filter (nats)' if bayes else 'validation loss (nats)')
        top.set(title=plain(f'{attn}, ') + label + (m == 'probe') * f', layer {exp["layer"]}', ylabel=MEASURES[m][1],
                xlabel=low.get_xlabel())
    marks = {'RoPE': {'marker': 'D', 'ls': ''}, 'kept': {'ls': '--'}, 'DroPE': {'ls': ':', 'marker': 'o', 'ms': 4}}
    if pick(exp['rows'], stage='nope'):
        marks['NoPE'] = {'marker': 's', 'ls': ''}
    legend(fig, looks(exp, exp['rows'], stages=False) | marks)
    return save(fig, cfg, exp, 'matched')

def factor_rows(exp):
    """Of (topic - shuffled, DroPE - kept): [(title, {x: tick}, [(label, colour, [(x, {measure: effect})])])], a row
    by cycles and cooldown for each kind of windows, and one by windows; [] where the arms vary in none of them."""
    arms = {}                                  # (attention, pure, cycles, cooldown) -> (order, {measure: effect})
    for e in exp['effects']:
        m = re.fullmatch(r'([a-z]+) (topic\w+) - shuffled(_pure)?, drope - kept', e['contrast'])
        if m and factors(m[2])[0] == bool(m[3]):
            pure, _, cycles, cooldown = factors(m[2])
            arms.setdefault((m[1], pure, cycles, cooldown), (m[2], {}))[1][e['measure']] = e
    rows, cools = [], sorted({k[3] for k in arms})
    for attn, pure in sorted({k[:2] for k in arms}, key=lambda k: (k[0] != 'mha', k[1])):
        mine = sorted(k[2:] for k in arms if k[:2] == (attn, pure))
        lines = [(f'{cool}% cooldown', ['#333333', *SPARE][i % 5],
                  [(n * 1.1 ** (i - (len(cools) - 1) / 2), arms[attn, pure, n, d][1]) for n, d in mine if d == cool])
                 for i, cool in enumerate(cools)]
        if len(mine) > 1:
            rows.append((f'{attn}, {"pure" if pure else "mixed"} windows', {n: n for n, _ in mine}, lines))
        both = [(arms[attn, False, *k][0], k) for k in mine if pure and (attn, False, *k) in arms]
        if both:
            rows.append((f'{attn}, by windows', {0: 'mixed', 1: 'pure'}, [
                (plain(order), exp['colour'][order], [(p + .06 * i, arms[attn, p > 0, *k][1]) for p in (0, 1)])
                for i, (order, k) in enumerate(both)]))
    return rows

def plot_factors(cfg, exp, rows):
    measures = ('score_p', 'probe', 'val_loss')
    fig, axes = canvas(cfg, exp, 'factors', len(rows), len(measures), 2.3, sharey='col')
    for ax, ((title, ticks, lines), m) in zip(axes.flat, itertools.product(rows, measures)):
        ax.axhline(0, color=GREY, lw=.8, zorder=0)
        for _, c, line in lines:
            line = [(x, e[m]) for x, e in line if m in e]
            ax.plot([x for x, _ in line], [e['mean'] for _, e in line], 'o-', color=c, lw=1, ms=4.5)
            for x, e in ((x, e) for x, e in line if e['low'] is not None):
                ax.plot([x, x], [e['low'], e['high']], color=c, lw=1.4)
        cycles = 0 not in ticks
        if cycles:
            ax.set_xscale('log', base=4)
        ax.set(xlim=(.6 * min(ticks), 1.7 * max(ticks)) if cycles else (-.4, 1.4), ylabel=f'effect ({MEASURES[m][1]})',
               xlabel='rounds of the topics (cycles)' if cycles else 'windows of the training rows',
               title=plain(f'{title}: ' if m == measures[0] else '') + MEASURES[m][0])
        ax.set_xticks([*ticks], ticks.values())
        ax.minorticks_off()
    for ax, (_, _, lines) in zip(axes[:, -1], rows):
        end_labels(ax, [(line[-1][1][m]['mean'], label, c) for label, c, line in lines if line and m in line[-1][1]])
    return save(fig, cfg, exp, 'factors')

def plot_ablation(cfg, exp, runs):
    kinds = {'topical': ('topical heads', '-'), 'entropy': ('heads of like entropy', '--'),
             'random': ('random heads', ':')}
    panels, stages = {}, present(runs, 'stage')
    for r in runs:
        panels.setdefault((r['attn'], r['order'], r['stage']), []).append(r['ana']['ablation'])
    arms = [(a, o) for a in present(runs, 'attn') for o in present(pick(runs, attn=a), 'order')]
    cols = min(5, len(arms))                   # a row of panels for each stage, and again for each five arms
    keys = [(*arm, s) if arm else None for i in range(0, len(arms), cols) for s in stages
            for arm in [*arms[i:i + cols], *[None] * cols][:cols]]
    fig, axes = canvas(cfg, exp, 'ablation', len(keys) // cols, cols, 1.5 if exp['many'] else 1.9, sharex=True,
                       sharey=True)
    for ax, (a, o, s) in fill(axes, keys, panels):
        ks = panels[a, o, s][0]['k']
        ax.axhline(0, color=GREY, lw=.8, zorder=0)
        for kind, (_, style) in kinds.items():
            y = np.array([[(c['far'] - c['near']) - (b['none']['far'] - b['none']['near']) for c in b[kind]]
                          for b in panels[a, o, s]], float)
            c, bold = exp['colour'][o] if kind == 'topical' else GREY, kind == 'topical'
            ax.plot(ks, y.T, color=c, lw=.7 * bold, alpha=.3)
            ax.plot(ks, mean(y), style, marker='o', ms=3, color=c, lw=1.8 if bold else 1.2, zorder=2 + bold)
        ax.set_xscale('log', base=2)
        ax.set_xticks(ks, ks)
        ax.set(xlabel='heads ablated', ylabel='Δ loss (nats)')
        ax.set_title(plain(f'{a} ' * (len({a for a, _ in arms}) > 1) + f'{o}, {s}'), color=exp['colour'][o])
    outer(axes)
    legend(fig, {name: {'ls': ls, 'color': '#000000' if kind == 'topical' else GREY, 'marker': 'o', 'ms': 3}
                 for kind, (name, ls) in kinds.items()})
    return save(fig, cfg, exp, 'ablation')

def plot_forgetting(cfg, exp, rows):
    attns, edges = present(rows, 'attn'), sorted({x for r in rows for x in r['since']})
    names = [f'{a}' if b == a + 1 else f'{a}–{b - 1}' for a, b in zip(edges, edges[1:])] + [f'{edges[-1]}+']
    fig, axes = canvas(cfg, exp, 'forgetting', len(attns), 1, tall(2.9, len(present(rows, 'order'))), sharex=True)
    for ax, attn in zip(axes.flat, attns):
        ends = []
        for r in pick(rows, attn=attn):
            y, c = np.array(r['excess'], float), exp['colour'].get(r['order'], GREY)
            x, y = np.array([edges.index(e) for e in r['since']])[np.isfinite(y)], y[np.isfinite(y)]
            ax.plot(x, y, marker='o', ms=3.5, color=c, lw=1.1 if exp['many'] else 1.8)
            ends += [(v, plain(r['order']), c) for v in y[-1:]]
        ax.axhline(0, color=GREY, lw=.8, zorder=0)
        ax.set_xticks(range(len(edges)), names)
        ax.set(title=plain(attn), ylabel='excess loss (nats per token)')
        end_labels(ax, ends)
    ax.set_xlabel('steps since the topic was last in the training rows')
    return save(fig, cfg, exp, 'forgetting')

def plot_recovery(cfg, exp, rows):
    rows = [r for r in rows if r['stage'] == 'drope' or any(s or s is None for s in r['steps'])]
    attns, least = present(rows, 'attn'), min([s for r in rows for s in r['steps'] if s], default=1)
    fig, axes = canvas(cfg, exp, 'recovery', 1, len(attns), 3.4, sharey=True)
    for ax, attn in zip(axes.flat, attns):
        for order, stage in itertools.product(present(rows, 'order'), present(rows, 'stage')):
            group, c = pick(rows, attn=attn, order=order, stage=stage), exp['colour'][order]
            y = np.array([r['steps'] for r in group], float)
            if len(y):
                ax.plot(group[0]['loss'], y.T, STAGES[stage][1], color=c, lw=.7, alpha=.3)
                ax.plot(group[0]['loss'], y.mean(0), STAGES[stage][1], marker='o', ms=3.5, color=c,
                        lw=1.1 if exp['many'] else 1.8)
        ax.set_yscale('symlog', linthresh=10 ** np.floor(np.log10(least)), linscale=.5)  # 0: there from the start
        ax.set_xscale('log')
        ax.set_xticks(rows[0]['loss'], [f'{x:g}' for x in rows[0]['loss']])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.set(ylim=(0, None), title=plain(attn), xlabel='loss above the Bayes filter to come to (nats)',
               ylabel='steps of recalibration')
        ax.label_outer()
    legend(fig, looks(exp, rows))
    return save(fig, cfg, exp, 'recovery')

def plot_free(cfg, exp, runs):
    arms = [(a, o) for a in present(runs, 'attn') for o in present(pick(runs, attn=a), 'order')]
    cols = min(len(arms), 5 if exp['many'] else 4)
    height = min(3, (cfg.fig_width - .6) / cols + .3)                  # about square
    fig, axes = canvas(cfg, exp, 'free', -(-len(arms) // cols), cols, height, sharex=True, sharey=True)
    for ax, (a, o) in fill(axes, arms, arms):
        ax.plot([0, 1], [0, 1], color=GREY, lw=.8, zorder=0)
        for r in pick(runs, attn=a, order=o):
            x, y = (np.array(r['ana']['heads'][k], float).ravel() for k in ('free_ceiling', 'free_fit'))
            c, rope = exp['colour'][o], r['stage'] == 'rope'
            ax.scatter(x, y, s=13, fc=c if rope else 'none', ec='white' if rope else c, lw=.3 if rope else .9,
                       alpha=.8, zorder=2 + (not rope))
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, .5, 1], yticks=[0, .5, 1], xlabel='ceiling',
               ylabel='overlap')
        ax.set_title(plain(f'{a} {o}'), color=exp['colour'][o])
    outer(axes)
    mark = {'marker': 'o', 'ls': '', 'ms': 4.5}
    legend(fig, {'RoPE': mark, 'DroPE': mark | {'mfc': 'none'}, 'positions explain all': {'lw': .8}})
    return save(fig, cfg, exp, 'free')

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
            c = exp['colour'].get(arm) or contrast_colour(exp, arm)
            col[i].plot([x] * len(y), y, '.' if i < 3 else '-', color=c, ms=4, alpha=.5)
            style = dict(marker='s' if attn == 'gqa' else 'o', color=c, ms=5, mfc=c if i < 3 else 'white', ls='')
            col[i].plot(x, mean(y) if i < 3 else y[0], **style)
            names |= {plain(arm): style | {'marker': 'o'}} if i < 3 or not (a['many'] or b['many']) else {}
        col[0].set_title(exp['name'], weight='bold')
    for i, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(('' if i < 3 else 'Δ ') + ('loss gap (nats)', 'score P', 'probe acc.')[i % 3])
    for ax in axes[3:].flat:
        ax.axhline(0, color=GREY, lw=.8, zorder=0)
    ax.set_xticks(range(len(ticks)), map(plain, ticks))
    legend(fig, names)
    return save(fig, cfg, a, f'compare_{b["name"]}')

def main(cfg):
    if len(cfg.paths) not in (1, 2):
        raise SystemExit('plot.py takes one experiment folder, or two to compare: plot.py out/demo [out/other]')
    exps, one = [load(path) for path in cfg.paths], len(cfg.paths) == 1
    for exp in exps:
        if not any(r['ana'] or (r['log'] and one) for r in exp['runs']):
            raise SystemExit(f'{exp["folder"]} holds no analysis.json yet: train and analyze a run first')
    ana = lambda key, part=None: [r for r in exp['runs'] if r['ana'] and r['ana'].get(key)
                                  and (part is None or part in r['ana'][key])]
    unkept = lambda *key: [r for r in ana(*key) if r['stage'] in ('rope', 'drope')]
    lens, aligned = [r for r in exp['runs'] if r['lens']], unkept('circuits', 'alignment')
    has_topics = lambda r: any(sum(row.get('topics') or []) for row in r['log'])
    recovered = [r for r in exp['recovery'] if any(s is not None for s in r['steps'])]
    recovered = recovered if any(s for r in recovered for s in r['steps']) else []         # all there at once: no news
    figures = {plot_loss: [r for r in exp['runs'] if len(curve([r], 'val_loss')[0])],
               plot_order: [r for r in exp['runs'] if r['stage'] == 'rope' and has_topics(r)],
               plot_scores_p: ana('heads', 'score_p'), plot_scores_o: ana('heads', 'o_z'),
               plot_maps: unkept('maps'), plot_words: [r for r in ana('words') if r['stage'] == 'rope'],
               plot_clusters: read(f'{exp["folder"]}/clusters.json'), plot_probe: ana('probe'),
               plot_distance: ana('probe', 'by_distance'), plot_spectra: unkept('circuits', 'qk'),
               plot_circuits: aligned if len(aligned) == len(unkept('circuits')) else [], plot_lens: lens,
               plot_strip: [r for r in lens if r['lens']['strip']],
               plot_effects: exp['effects'], plot_matched: exp['matched'],
               plot_factors: factor_rows(exp), plot_ablation: unkept('ablation'),
               plot_forgetting: exp['forgetting'], plot_recovery: recovered,
               plot_free: unkept('heads', 'free_fit')}
    paths = [f(cfg, exp, data) for f, data in figures.items() if data] if one else [plot_compare(cfg, *exps)]
    print('\n'.join(paths))
    return paths

if __name__ == '__main__':
    main(configure(__file__, positional=True))
