"""Figures from made-up rows: all are drawn, also for orders and positions that plot.py has never heard of."""
import base64
import os
import zlib

import numpy as np
import pytest

import plot
import runs
from test_report import row
from test_train import run, succeeds

HEADER = {'experiment': 'made_up', 'device': 'cpu', 'versions': {},
          'compare': {'base': 'shuffled', 'placebo': 'pseudo', 'primary': ['score_p', 'reverse', 'drope']}}

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
    example = {'layer': 1, 'head': 2, 'score_p': None,
               'topics': [0, 0, 8, 8, 8, 1, 1, 1], 'uint8': pixels}
    runs.write_text(os.path.join(folder, 'runs.jsonl'), runs.dump_rows(HEADER, rows))
    runs.write_json(os.path.join(folder, 'examples.json'), {'mha_reverse_rope': example})
    return plot.load(str(folder))

@pytest.mark.parametrize('seeds', [(0, 1), (3,)])
def test_every_figure_is_drawn(tmp_path, seeds):
    assert f'n = {len(seeds)}' in written(tmp_path, seeds).note
    succeeds(run('plot.py', str(tmp_path)))
    sizes = [path.stat().st_size for path in (tmp_path / 'figures').iterdir()]
    assert len(sizes) == 8 and min(sizes) > 5000

def test_figures_show_the_rows(tmp_path):
    """P of a head is the mean over seeds at its place, the order begins at step 0, effects are report.py's."""
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

def test_course_shows_the_primary_beside_its_control(tmp_path):
    ax, = plot.plot_course(written(tmp_path, seeds=(0, 1))).axes
    shown = dict(zip(*reversed(ax.get_legend_handles_labels())))
    of = 'mha_reverse - mha_shuffled, '
    assert shown.keys() == {of + 'rope', of + 'kept', of + 'drope', 'mha_pseudo - mha_shuffled, drope'}
    faint = [line.get_ydata() for line in ax.lines if line.get_alpha() == 0.2]          # 2 seeds, kept and dropped
    for y in (shown[of + 'rope'].get_ydata(), shown[of + 'kept'].lines[0].get_ydata(), *faint):
        assert np.allclose(y, len('reverse') - len('shuffled')) and len(y) == 2 and len(faint) == 4
