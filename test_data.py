"""shards.py and data_synth.py: chains, segments, the Bayes filter against enumeration, and every error line."""
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import data_synth
import shards
from configurator import configure

SMALL = ('--vocab_size=64', '--n_topics=3', '--block_size=63', '--min_segment_len=8', '--train_rows=300',
         '--val_rows=100')
CHAINS = {'range': ('--chain=range',), 'group': ('--chain=group', '--n_groups=8', '--repeats=False')}


def config(*flags):
    return configure('data_synth.py', ['--device=cpu', *flags])


def tables_of(*flags, seed=0):
    """(config, tables as an array [T, R, V], tables and row_of as tensors for bayes_filter)"""
    cfg = config(*flags)
    tables, sums, row_of = data_synth.make_tables(cfg, np.random.SeedSequence(seed))
    return cfg, tables, sums, row_of


def build(tmp_path, *flags):
    return shards.read(data_synth.main(config(f'--data_dir={tmp_path}', *SMALL, *flags)))


def bytes_of(folder, name):
    return open(os.path.join(folder, name), 'rb').read()


def refused(text, function, *args):
    """The call stops with one line that holds the text."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert text in str(stop.value) and '\n' not in str(stop.value), stop.value


# -----------------------------------------------------------------------------
# chains

def test_range_tables():
    cfg, tables, sums, row_of = tables_of('--vocab_size=259', '--n_topics=4', '--concentration=3')
    assert tables.shape == (4, 256, 259) and (row_of[3:] == np.arange(256)).all()
    np.testing.assert_allclose(tables.sum(2), 1, atol=1e-6)
    assert not tables[:, :, :3].any()                       # PAD, BOS, EOS are never emitted
    for z, seed in enumerate(np.random.SeedSequence(0).spawn(4)):
        rng, size = np.random.default_rng(seed), 64         # the specification again, entry by entry
        normals = rng.standard_normal((256, 256), np.float32).astype(float)
        own = range(3 + z * size, 3 + z * size + size)
        order = rng.permutation(size)
        pairs = {(own[order[i]], own[order[32 + i]]) for i in range(32)}  # 64 tokens have room for 32 of the 50
        assert len({token for pair in pairs for token in pair}) == 64
        for a in range(3, 259, 5):
            row = np.array([normals[a - 3, b - 3] ** 2 / 2 * (3 if b in own else 1)
                            * (10 / 0.3 if (a, b) in pairs else 1) for b in range(3, 259)])
            np.testing.assert_allclose(tables[z, a - 3, 3:], row / row.sum(), rtol=1e-4, atol=1e-9)
    flat = sums.ravel()
    assert (np.diff(flat) >= 0).all() and (sums[:, :, -1].ravel() == np.arange(1, 1025)).all()


def test_range_is_dirichlet_half():
    _, tables, _, _ = tables_of('--vocab_size=403', '--n_topics=1', '--concentration=1')
    p = tables[0, :, 3:] * 400                              # 50 of 160,000 entries are signatures
    assert abs(np.mean(p < 0.01) - chi2(1).cdf(0.01)) < 0.005 and abs(np.mean(p < 1) - chi2(1).cdf(1)) < 0.02


def test_range_transition_entropy():
    """The log's 7.28 nats, on the first 100 rows of two topics of Run 1."""
    cfg, h = config(), []
    for z in (0, 1):
        p = data_synth.range_table(np.random.default_rng(z), z, cfg)[::40].astype(float)
        h.append(-(p * np.log(np.maximum(p, 1e-30))).sum(1).mean())
    assert abs(np.mean(h) - 7.28) < 0.01


def test_group_tables():
    _, tables, _, row_of = tables_of('--chain=group', '--vocab_size=96', '--n_groups=12', '--n_topics=3')
    assert tables.shape == (3, 12, 96) and (np.bincount(row_of) == 8).all()
    full = tables[:, row_of].astype(float)                  # [T, V, V]
    np.testing.assert_allclose(full.sum(2), 1, atol=1e-6)
    np.testing.assert_allclose(full.sum(1), 1, atol=1e-6)   # doubly stochastic: every token equally frequent
    groups = tables.reshape(3, 12, 12, 8)
    assert (groups == groups[..., :1]).all()                # uniform inside the next group
    logs = np.log(groups[..., 0])                           # Sinkhorn moves rows and columns alone: interactions stay
    inter = logs - logs.mean(1, keepdims=True) - logs.mean(2, keepdims=True) + logs.mean((1, 2), keepdims=True)
    assert abs(inter.std() / (1.5 * 11 / 12) - 1) < 0.12 and abs(np.corrcoef(inter.reshape(3, -1))).min() < 0.2
    uniform = data_synth.topic_given_token((torch.from_numpy(tables), torch.from_numpy(row_of)))
    np.testing.assert_allclose(uniform, 1 / 3, atol=1e-5)


@pytest.mark.parametrize('chain', CHAINS)
def test_tokens_follow_the_tables(chain):
    cfg, tables, sums, row_of = tables_of(*CHAINS[chain], '--vocab_size=16', '--n_topics=2')
    rng = np.random.default_rng(1)
    topics = data_synth.draw_topics(rng, data_synth.draw_segments(rng, chain, 2000, 64, 2, 5, 8), 2, True)
    first = 3 if chain == 'range' else 0
    sums, rows = torch.from_numpy(sums), torch.from_numpy(row_of)
    tokens = data_synth.draw_tokens(np.random.SeedSequence(3), sums, rows, first, topics)
    assert abs(np.bincount(tokens[:, 0], minlength=16)[first:] / 2000 - 1 / (16 - first)).max() < 0.025
    counts = np.zeros((2, 16, 16))
    np.add.at(counts, (topics[:, 1:], tokens[:, :-1], tokens[:, 1:]), 1)  # also across boundaries

    def p_value(tables):
        expected = tables[:, row_of] * counts.sum(2, keepdims=True)
        use = expected > 5
        stat = ((counts - expected)[use] ** 2 / expected[use]).sum()
        return chi2(use.sum() - 2 * (16 - first)).sf(stat)

    assert p_value(tables.astype(float)) > 1e-4
    assert p_value(tables[::-1].astype(float)) < 1e-12      # the topics' tables exchanged
    assert p_value(tables[:, ::-1].astype(float)) < 1e-12   # the rows in another order


# -----------------------------------------------------------------------------
# segments

def test_segment_counts_and_minima():
    for chain in CHAINS:
        lengths = data_synth.draw_segments(np.random.default_rng(0), chain, 20_000, 100, 2, 5, 12)
        n = (lengths > 0).sum(1)
        assert (lengths.sum(1) == 100).all() and lengths[lengths > 0].min() >= 12
        assert (np.diff((lengths > 0).astype(int), axis=1) <= 0).all()      # zeros come last
        assert abs(np.bincount(n)[2:] / 20_000 - 0.25).max() < 0.015 and n.min() == 2 and n.max() == 5
        assert (data_synth.draw_segments(np.random.default_rng(0), chain, 9, 20, 1, 1, 12) == 20).all()  # pure windows


@pytest.mark.parametrize('chain', CHAINS)
def test_segment_lengths_follow_the_specification(chain):
    """Three segments with 6 spare tokens, against all 28 ways: multinomial weights or uniform."""
    lengths = data_synth.draw_segments(np.random.default_rng(0), chain, 30_000, 15, 3, 3, 3) - 3
    f = np.cumprod([1, *range(1, 7)])                       # factorials
    ways = [(a, b, 6 - a - b) for a in range(7) for b in range(7 - a)]
    p = np.array([f[6] / f[a] / f[b] / f[c] / 3**6 if chain == 'range' else 1 / 28 for a, b, c in ways])
    seen = np.array([(lengths == way).all(1).sum() for way in ways])
    assert abs(p.sum() - 1) < 1e-12 and seen.sum() == 30_000
    assert chi2(27).sf(((seen - 30_000 * p) ** 2 / (30_000 * p)).sum()) > 1e-4


def test_topics_of_segments():
    lengths = np.full((20_000, 4), 2)
    for repeats in (True, False):
        topics = data_synth.draw_topics(np.random.default_rng(0), lengths, 4, repeats)
        assert topics.shape == (20_000, 8) and (topics[:, ::2] == topics[:, 1::2]).all()
        pairs = np.zeros((4, 4))
        np.add.at(pairs, (topics[:, 0:6:2], topics[:, 2:8:2]), 1)
        wanted = np.full((4, 4), 1 / 16) if repeats else (1 - np.eye(4)) / 12
        assert abs(pairs / pairs.sum() - wanted).max() < 0.005 and (repeats or not pairs.trace())


@pytest.mark.parametrize('chain', CHAINS)
def test_hazard_is_the_frequency_of_ends(chain):
    lengths = data_synth.draw_segments(np.random.default_rng(0), chain, 200_000, 24, 2, 5, 3)
    starts = np.cumsum(np.pad(lengths, ((0, 0), (1, 0))), 1)[:, :-1]
    hazard = data_synth.hazard_table(chain, 24, 2, 5, 3)
    for s in (0, 3, 5, 9, 14):
        ends = (starts + lengths)[(starts == s) & (lengths > 0)]
        for t in range(s + 1, 24):
            alive = max((ends >= t).sum(), 1)
            assert abs(hazard[s, t] - (ends == t).sum() / alive) < 4.5 * 0.5 / np.sqrt(alive)
    assert not hazard[:, :3].any() and hazard[0, 21] == pytest.approx(1)    # a last chance for the first of two


# -----------------------------------------------------------------------------
# the filter

def enumerate_rows(tokens, tables, row_of, chain, low, high, shortest, repeats):
    """log P(x_t | past) [B, S-1] and P(z_t | x_0..x_t) [B, S, T], by the sum over every segmentation and labelling."""
    (B, S), T = tokens.shape, len(tables)
    mass = np.zeros((B, S, T))                              # P(x_1..x_t, z_t | x_0)
    for n in range(low, high + 1):
        cuts = [c for c in itertools.product(range(shortest, S + 1), repeat=n) if sum(c) == S]
        weight = np.array([1 / math.prod(math.factorial(k - shortest) for k in c) if chain == 'range' else 1
                           for c in cuts])
        labels = [z for z in itertools.product(range(T), repeat=n)
                  if repeats or all(a != b for a, b in zip(z, z[1:]))]
        for cut, w in zip(cuts, weight / weight.sum()):
            for label in labels:
                z = np.repeat(label, cut)
                p = tables[z[1:], row_of[tokens[:, :-1]], tokens[:, 1:]]    # [B, S-1]
                path = np.cumprod(np.concatenate([np.ones((B, 1)), p], 1), 1)
                mass[:, np.arange(S), z] += path * w / len(labels) / (high - low + 1)
    total = mass.sum(2)
    return np.log(total[:, 1:] / total[:, :-1]), mass / total[:, :, None]


@pytest.mark.parametrize('most', (2, 3))
@pytest.mark.parametrize('repeats', (True, False))
@pytest.mark.parametrize('chain', CHAINS)
def test_filter_against_enumeration(chain, repeats, most):
    cfg, tables, sums, row_of = tables_of(f'--chain={chain}', '--vocab_size=15', '--n_topics=3', '--concentration=3',
                                          '--n_groups=5', '--beta=1')
    rng, first = np.random.default_rng(2), 3 if chain == 'range' else 0
    topics = data_synth.draw_topics(rng, data_synth.draw_segments(rng, chain, 200, 14, 2, most, 3), 3, repeats)
    P, sums, rows = torch.from_numpy(tables), torch.from_numpy(sums), torch.from_numpy(row_of)
    tokens = data_synth.draw_tokens(np.random.SeedSequence(1), sums, rows, first, topics).astype(int)
    exact, belief = enumerate_rows(tokens, tables.astype(float), row_of, chain, 2, most, 3, repeats)
    hazard = torch.from_numpy(data_synth.hazard_table(chain, 14, 2, most, 3))
    logp, posterior = data_synth.bayes_filter(torch.from_numpy(tokens), (P, rows), hazard, repeats)
    logp, posterior = logp.numpy(), posterior.numpy()
    assert logp.shape == (200, 13) and posterior.shape == (200, 14, 3)
    np.testing.assert_allclose(posterior.sum(2), 1, atol=1e-12)
    assert abs(logp.mean() - exact.mean()) < 3e-4 and abs(posterior - belief).mean() < 5e-3
    end = 14 if most == 2 else 6        # exact with one boundary: none is forgotten, and two need 6 tokens before them
    np.testing.assert_allclose(logp[:, :end - 1], exact[:, :end - 1], atol=1e-6)
    np.testing.assert_allclose(posterior[:, :end], belief[:, :end], atol=1e-6)


def test_impossible_tokens():
    cfg, tables, _, row_of = tables_of(*SMALL)
    tables, hazard = (torch.from_numpy(tables), torch.from_numpy(row_of)), torch.zeros(4, 4, dtype=torch.float64)
    refused('no topic can make', data_synth.bayes_filter, torch.tensor([[5, 6, 0, 7]]), tables, hazard, True)


@pytest.mark.parametrize('chain', CHAINS)
def test_references(tmp_path, chain):
    flags = (*SMALL, '--vocab_size=256', *CHAINS[chain])
    data = build(tmp_path, *flags, '--eval_rows=80')
    loss = data.meta['references']
    assert loss['oracle'] < loss['filter'] < loss['bigram'] < loss['uniform'] == pytest.approx(np.log(256))
    assert data.meta['reference_rows'] == 80 and data.val_posterior.shape == (100, 64, 3)
    tables, _, row_of = data_synth.make_tables(config(*flags), np.random.SeedSequence(0).spawn(3)[0])
    x, z = data.val[:80].astype(int), data.val_topics[:80]
    p = tables[:, row_of[x[:, :-1]], x[:, 1:]].astype(float)                # [T, 80, 63]
    true = np.take_along_axis(p, z[None, :, 1:].astype(int), 0)
    assert loss['oracle'] == pytest.approx(-np.log(true).mean(), abs=1e-6)
    full = tables[:, row_of].astype(float)                                  # stationary: the rows of a high power
    frequency = np.stack([np.linalg.matrix_power(m[3:, 3:] if chain == 'range' else m, 64)[0] for m in full])
    post = (frequency / frequency.sum(0))[:, x[:, :-1] - 3 * (chain == 'range')]
    assert loss['bigram'] == pytest.approx(-np.log((post * p).sum(0)).mean(), abs=1e-5)
    right = data.val_posterior.argmax(2) == data.val_topics                 # it knows topics, best far from a boundary
    assert right[:, 6:].mean() > 0.6 > 0.45 > right[:, 0].mean()


# -----------------------------------------------------------------------------
# the files

@pytest.mark.parametrize('chain', CHAINS)
def test_same_seed_same_bytes(tmp_path, chain):
    for name, flags in {'a': (), 'b': (), 'c': ('--train_rows=77', '--min_segments=1', '--max_segments=1'),
                        'd': ('--seed=1',)}.items():
        data_synth.main(config(f'--data_dir={tmp_path}/{name}', *SMALL, *CHAINS[chain], *flags))
    a, b, c, d = (f'{tmp_path}/{name}/seed{int(name == "d")}' for name in 'abcd')
    for name in os.listdir(a):
        assert bytes_of(a, name) == bytes_of(b, name)
        assert bytes_of(a, name) != bytes_of(d, name)
        assert (bytes_of(a, name) == bytes_of(c, name)) == (name in ('val.bin', 'val_topics.bin', 'val_posterior.bin'))
    pure = shards.read(c)
    assert (pure.train_topics == pure.train_topics[:, :1]).all() and len(pure.train) == 77
    assert (pure.val_topics != pure.val_topics[:, :1]).any()
    if chain == 'group':                                                    # repeats=False: 2-5 runs of at least 8
        runs = (np.diff(pure.val_topics.astype(int), axis=1) != 0).sum(1) + 1
        assert set(runs) == {2, 3, 4, 5}


def test_there_already_or_with_other_parameters(tmp_path, capsys):
    build(tmp_path)
    before = os.stat(f'{tmp_path}/seed0/val.bin').st_mtime_ns
    build(tmp_path)
    assert 'is there' in capsys.readouterr().out and os.stat(f'{tmp_path}/seed0/val.bin').st_mtime_ns == before
    refused('n_topics is 3 there, 4 here; concentration is 5.0 there, 9.0 here', build, tmp_path, '--n_topics=4',
            '--concentration=9')


def test_meta(tmp_path):
    data = build(tmp_path)
    assert data.meta['rows'] == {'train': 300, 'val': 100} and data.meta['kind'] == 'synthetic'
    for name, entry in data.meta['files'].items():
        raw = bytes_of(f'{tmp_path}/seed0', name)
        assert entry == {'bytes': len(raw), 'sha256': hashlib.sha256(raw).hexdigest()}
    assert len(data.meta['files']) == 5 and os.listdir(tmp_path) == ['seed0']
    assert (data.train[:100, 0] == data.val[:, 0]).mean() < 0.2  # validation rows have a stream of their own


def own(rows=6, **changes):
    """Somebody's own labelled tokens: 10 kinds, rows of 5, 2 topics."""
    rng = np.random.default_rng(0)
    arrays = {'train': rng.integers(0, 10, (rows, 5)), 'val': rng.integers(0, 10, (2, 5)),
              'train_topics': rng.integers(0, 2, (rows, 5)), 'val_topics': rng.integers(0, 2, (2, 5))}
    return {**arrays, **changes}


META = {'vocab_size': 10, 'block_size': 4, 'n_topics': 2}


def test_own_tokens(tmp_path):
    shards.write(tmp_path / 'x', own(), META)
    data = shards.read(tmp_path / 'x')
    assert (data.train == own()['train']).all() and data.train.dtype == np.uint16 and data.val_posterior is None
    assert (data.val_topics == own()['val_topics']).all() and data.val_topics.dtype == np.uint8
    os.mkdir(tmp_path / 'y')                                # or by hand: four files and the three numbers
    for name, array in own().items():
        array.astype(shards.dtype_of(name)).tofile(tmp_path / 'y' / f'{name}.bin')
    (tmp_path / 'y' / 'meta.json').write_text(json.dumps(META))
    assert (shards.read(tmp_path / 'y').train == data.train).all()
    refused('is there already', shards.write, tmp_path / 'y', own(), META)


@pytest.mark.parametrize('change, line', (
    (dict(train=own()['train'] + 65530), 'train must hold integers from 0 to 65535'),
    (dict(train=own()['train'] - 5), 'train must hold integers'),
    (dict(val=own()['val'] * 0.5), 'val must hold integers'),
    (dict(val=own()['val'] + 10), 'val.bin: holds 1'),
    (dict(val_topics=own()['val_topics'] + 2), 'val_topics.bin: holds 3, but meta.json has n_topics = 2'),
    (dict(train_topics=own(5)['train_topics']), 'train_topics.bin: has 25 bytes, not the 6 rows'),
    (dict(train_topics=own()['train_topics'][:, :3]), 'train_topics.bin: has 18 bytes'),
    (dict(train=own()['train'].ravel()), "cannot write 'train' of shape (30,)"),
    (dict(extra=own()['train']), "cannot write 'extra'"),
    (dict(val=own()['val'][:0], val_topics=own()['val'][:0]), 'val.bin: has 0 bytes'),
    (dict(val_posterior=np.zeros((2, 5, 3))), 'val_posterior.bin: has 60 bytes, not the 2 rows of 20'),
))
def test_write_refuses(tmp_path, change, line):
    refused(line, shards.write, tmp_path / 'x', own(**change), META)
    assert not os.listdir(tmp_path)                         # nothing is left behind


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize('name, change, line', (
    ('train.bin', lambda b: b[:-1], 'train.bin: has 59 bytes, not the 6 rows of 10 that meta.json has'),
    ('train.bin', lambda b: b[:-10], 'train.bin: has 50 bytes'),
    ('val_topics.bin', lambda b: b[:-5], 'val_topics.bin: has 5 bytes, not the 2 rows of 5 that val.bin has'),
    ('train_topics.bin', lambda b: b + b'\0', 'train_topics.bin: has 31 bytes'),
    ('val.bin', lambda b: b[:-2] + b'\x0a\0', 'val.bin: holds 10, but meta.json has vocab_size = 10'),
    ('train_topics.bin', lambda b: b'\x02' + b[1:], 'train_topics.bin: holds 2, but meta.json has n_topics = 2'),
    ('meta.json', lambda b: b[:-9], 'meta.json: cannot be read as JSON'),
    ('meta.json', lambda b: b'\xff', 'meta.json: cannot be read as JSON'),
    ('meta.json', lambda b: b'[1]', 'meta.json: needs vocab_size'),
    ('meta.json', lambda b: b.replace(b'"n_topics": 2', b'"n_topics": "2"'), 'meta.json: needs n_topics'),
))
def test_read_names_the_bad_file(tmp_path, name, change, line):
    shards.write(tmp_path / 'x', own(), META)
    damage(tmp_path / 'x', name, change)
    refused(line, shards.read, tmp_path / 'x')


def test_read_names_the_missing_file(tmp_path):
    refused('python data_synth.py config/', shards.read, tmp_path / 'x')
    refused('python data_synth.py config/', shards.read, tmp_path)
    shards.write(tmp_path / 'x', own(val_posterior=np.zeros((2, 5, 2))), META)
    for name in ('val_posterior.bin', 'val_topics.bin', 'train.bin'):
        os.remove(tmp_path / 'x' / name)
        refused(f'{name}: missing', shards.read, tmp_path / 'x')


def test_unwritable(tmp_path):
    (tmp_path / 'file').write_text('')
    refused('cannot be written', shards.write, tmp_path / 'file' / 'x', own(), META)
    refused('cannot be written', data_synth.main, config(f'--data_dir={tmp_path}/file', *SMALL))
    (tmp_path / 'seed0').mkdir()
    refused('is no dataset', build, tmp_path)


def test_the_name_comes_last(tmp_path, monkeypatch):
    seen, read = [], shards.read
    monkeypatch.setattr(shards, 'read', lambda folder: (seen.append(os.stat(folder).st_ino), read(folder)))
    shards.write(tmp_path / 'x', own(), META)
    assert seen == [os.stat(tmp_path / 'x').st_ino]         # the folder that was checked, renamed, and no copy of it


def test_exception_leaves_nothing(tmp_path):
    class Breaks(np.ndarray):                               # the last array fails, the others have been written
        def __getitem__(self, rows):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / 'x', own(val_topics=own()['val_topics'].view(Breaks)), META)
    assert not os.listdir(tmp_path)


def test_kill_leaves_no_dataset(tmp_path):
    """A process that dies while it writes: its temporary folder is no dataset, and the next run clears it away."""
    code = ('import os, signal, sys, test_data, shards\n'
            'shards.read = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n'  # all is written but the rename
            'shards.write(sys.argv[1], test_data.own(), test_data.META)')
    died = subprocess.run([sys.executable, '-c', code, tmp_path / 'x'], cwd=os.path.dirname(os.path.abspath(__file__)))
    left = os.listdir(tmp_path)
    assert died.returncode == -9 and len(left) == 1 and left[0].startswith('x.tmp-')
    refused('no dataset here', shards.read, tmp_path / 'x')
    os.mkdir(tmp_path / f'x.tmp-{os.getppid()}')            # a run that is still alive is left alone
    shards.write(tmp_path / 'x', own(), META)
    assert sorted(os.listdir(tmp_path)) == ['x', f'x.tmp-{os.getppid()}'] and shards.read(tmp_path / 'x')


@pytest.mark.parametrize('flags, line', (
    (('--chain=bigram',), "chain='bigram': choose range or group"),
    (('--vocab_size=70000',), 'vocab_size=70000'),
    (('--n_topics=256',), 'n_topics=256'),
    (('--chain=group', '--n_groups=7'), 'n_groups=7 does not cut vocab_size=64'),
    (('--min_segment_len=20',), '5 segments of min_segment_len=20 do not fit in a row of block_size + 1 = 64'),
    (('--max_segments=9',), '9 segments'),
    (('--min_segments=4', '--max_segments=3'), 'min_segments=4 is more than max_segments=3'),
    (('--min_segments=0',), 'min_segments=0: must be at least 1'),
    (('--val_rows=0',), 'val_rows=0'),
    (('--seed=-1',), 'seed=-1'),
    (('--n_topics=1', '--repeats=False'), 'n_topics=1 needs repeats=True'),
    (('--n_topics=40',), 'need 83'),
    (('--concentration=0',), 'concentration=0'),
    (('--chain=group', '--n_groups=8', '--beta=-1'), 'beta=-1'),
    (('--vocab_size=65535', '--n_topics=255'), 'the tables need'),
    (('--device=tpu9',), "device='tpu9'"),
))
def test_bad_settings(tmp_path, flags, line):
    refused(line, build, tmp_path, *flags)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('chain', CHAINS)
def test_same_bytes_on_gpu(tmp_path, chain):
    cpu, gpu = (build(tmp_path / device, *CHAINS[chain], f'--device={device}') for device in ('cpu', 'cuda'))
    for name in ('train', 'train_topics', 'val', 'val_topics'):
        assert (getattr(cpu, name) == getattr(gpu, name)).all()
    np.testing.assert_allclose(cpu.val_posterior, gpu.val_posterior, atol=1e-3)
    for key, loss in cpu.meta['references'].items():
        assert loss == pytest.approx(gpu.meta['references'][key], abs=1e-6)
