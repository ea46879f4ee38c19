"""shards.py and data_synth.py: chains, segments, the Bayes filter against enumeration, and every error line."""
import hashlib
import itertools
import json
import os

import numpy as np
import pytest
import torch
from scipy.stats import chi2, entropy, multinomial

import data_synth
import shards
from configurator import configure

SMALL = ('--vocab_size=64', '--n_topics=3', '--block_size=63', '--min_segment_len=8', '--train_rows=300',
         '--val_rows=100')
NAMES = ('train', 'train_topics', 'val', 'val_topics')
CHAINS = {'range': ('--chain=range',), 'group': ('--chain=group', '--n_groups=8', '--repeats=False')}

each_chain = pytest.mark.parametrize('chain', CHAINS)

def config(*flags):
    return configure('data_synth.py', ['--device=cpu', *flags])

def tables_of(*flags):
    """(tables [T, R, V] in fp64, and as tensors: tables, sums, row_of)"""
    made = data_synth.make_chains(config(*flags), 'cpu')[:3]
    return made[0].numpy().astype(float), *made

def drawn(chain, sums, row_of, rows, length, most, shortest, n_topics, repeats):
    """Topics uint8 and tokens int64 [rows, length] of 2 to `most` segments."""
    rng, first = np.random.default_rng(2), 3 if chain == 'range' else 0
    lengths = data_synth.draw_segments(rng, chain, rows, length, 2, most, shortest)
    topics = data_synth.draw_topics(rng, lengths, n_topics, repeats)
    return topics, data_synth.draw_tokens(rng, sums, row_of, first, topics).astype(int)

def build(tmp_path, *flags):
    """A small dataset, read back."""
    return shards.read(data_synth.main(config(f'--data_dir={tmp_path}', *SMALL, *flags)))

def refused(text, function, *args):
    """The call stops with one line that holds the text."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert text in str(stop.value) and '\n' not in str(stop.value), stop.value

def test_range_tables():
    """The specification again: own ranges and pairs; Dirichlet(0.5) rows; 7.28 nats of entropy in topics of Run 1."""
    tables, _, sums, row_of = tables_of('--vocab_size=259', '--n_topics=4', '--concentration=3')
    assert tables.shape == (4, 256, 259) and (row_of[3:] == torch.arange(256)).all()
    for z, seed in enumerate(np.random.SeedSequence(0).spawn(3)[0].spawn(4)):
        rng, own = np.random.default_rng(seed), np.arange(64) + z * 64
        weight = np.square(rng.standard_normal((256, 256), np.float32).astype(float))
        weight[:, own] *= 3
        a, b = own[rng.permutation(64)].reshape(2, 32)      # 64 tokens have room for 32 of the 50 pairs
        weight[a, b] *= 10 / 0.3
        expected = weight / weight.sum(1, keepdims=True)
        np.testing.assert_allclose(tables[z, :, 3:], expected, rtol=1e-4, atol=1e-9)
    assert not tables[:, :, :3].any()                       # PAD, BOS, EOS are never emitted
    assert (np.diff(sums.ravel()) >= 0).all() and (sums[:, :, -1].ravel() == torch.arange(1, 1025)).all()
    p = [data_synth.range_table(np.random.default_rng(z), z, config())[::40].astype(float) for z in (0, 1)]
    assert abs(entropy(p, axis=2).mean() - 7.28) < 0.01

def test_group_tables():
    tables, P, _, row_of = tables_of('--chain=group', '--vocab_size=96', '--n_groups=12', '--n_topics=3')
    assert tables.shape == (3, 12, 96) and (np.bincount(row_of) == 8).all()
    full = tables[:, row_of]                                # [T, V, V], doubly stochastic: tokens equally frequent
    for axis in (1, 2):
        np.testing.assert_allclose(full.sum(axis), 1, atol=1e-6)
    groups = tables.reshape(3, 12, 12, 8)
    assert (groups == groups[..., :1]).all()                # uniform inside the next group
    logs = np.log(groups[..., 0])                           # Sinkhorn moves rows and columns: interactions stay
    inter = logs - logs.mean(1, keepdims=True) - logs.mean(2, keepdims=True) + logs.mean((1, 2), keepdims=True)
    assert abs(inter.std() / (1.5 * 11 / 12) - 1) < 0.12 and abs(np.corrcoef(inter.reshape(3, -1))).min() < 0.2
    np.testing.assert_allclose(data_synth.topic_given_token(P, row_of), 1 / 3, atol=1e-5)

@each_chain
def test_tokens_follow_the_tables(chain):
    tables, _, sums, row_of = tables_of(*CHAINS[chain], '--vocab_size=16', '--n_topics=2')
    topics, tokens = drawn(chain, sums, row_of, 2000, 64, 5, 8, 2, True)
    first = 3 if chain == 'range' else 0
    assert abs(np.bincount(tokens[:, 0], minlength=16)[first:] / 2000 - 1 / (16 - first)).max() < 0.025
    counts = np.zeros((2, 16, 16))
    np.add.at(counts, (topics[:, 1:], tokens[:, :-1], tokens[:, 1:]), 1)  # also across boundaries
    p = []
    for other in (tables, tables[::-1], tables[:, ::-1]):   # the topics' tables exchanged, the rows in another order
        expected = other[:, row_of] * counts.sum(2, keepdims=True)
        use = expected > 5
        p.append(chi2(use.sum() - 2 * (16 - first)).sf(((counts - expected)[use] ** 2 / expected[use]).sum()))
    assert p[0] > 1e-4 and max(p[1:]) < 1e-12

@each_chain
def test_segment_lengths(chain):
    """Counts and minima; and three segments with 6 spare tokens in all 28 ways: multinomial weights or uniform."""
    lengths = data_synth.draw_segments(np.random.default_rng(0), chain, 20_000, 100, 2, 5, 12)
    assert (lengths.sum(1) == 100).all() and lengths[lengths > 0].min() >= 12
    assert (np.diff((lengths > 0).astype(int), axis=1) <= 0).all()          # zeros come last
    assert abs(np.bincount((lengths > 0).sum(1), minlength=6) / 20_000 - [0, 0, .25, .25, .25, .25]).max() < 0.015
    lengths = data_synth.draw_segments(np.random.default_rng(0), chain, 30_000, 15, 3, 3, 3) - 3
    ways = [way for way in itertools.product(range(7), repeat=3) if sum(way) == 6]
    p = multinomial(6, [1 / 3] * 3).pmf(ways) if chain == 'range' else np.full(28, 1 / 28)
    seen = np.array([(lengths == way).all(1).sum() for way in ways])
    assert seen.sum() == 30_000 and chi2(27).sf(((seen - 30_000 * p) ** 2 / (30_000 * p)).sum()) > 1e-4

@pytest.mark.parametrize('repeats, wanted', ((True, np.full((4, 4), 1 / 16)), (False, (1 - np.eye(4)) / 12)))
def test_topics_of_segments(repeats, wanted):
    topics = data_synth.draw_topics(np.random.default_rng(0), np.full((20_000, 4), 2), 4, repeats)
    assert topics.shape == (20_000, 8) and (topics[:, ::2] == topics[:, 1::2]).all()
    pairs = np.histogram2d(topics[:, 0:6:2].ravel(), topics[:, 2:8:2].ravel(), range(5))[0]
    assert abs(pairs / pairs.sum() - wanted).max() < 0.005 and (repeats or not pairs.trace())

def enumerate_rows(tokens, tables, row_of, chain, low, high, shortest, repeats):
    """log P(x_t | past) [B, S-1] and P(z_t | x_0..x_t) [B, S, T], by a sum over all segmentations and labellings."""
    (B, S), T = tokens.shape, len(tables)
    mass = np.zeros((B, S, T))                              # P(x_1..x_t, z_t | x_0)
    for n in range(low, high + 1):
        cuts = [c for c in itertools.product(range(shortest, S + 1), repeat=n) if sum(c) == S]
        spread = multinomial(S - n * shortest, [1 / n] * n).pmf(np.array(cuts) - shortest)
        weight = spread if chain == 'range' else np.ones(len(cuts))
        labels = [z for z in itertools.product(range(T), repeat=n) if repeats or all(np.diff(z))]
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
@each_chain
def test_filter_against_enumeration(chain, repeats, most):
    tables, P, sums, row_of = tables_of(f'--chain={chain}', '--vocab_size=15', '--n_topics=3', '--concentration=3',
                                        '--n_groups=5', '--beta=1')
    _, tokens = drawn(chain, sums, row_of, 200, 14, most, 3, 3, repeats)
    exact, belief = enumerate_rows(tokens, tables, row_of, chain, 2, most, 3, repeats)
    hazard = torch.from_numpy(data_synth.hazard_table(chain, 14, 2, most, 3))
    lik = data_synth.likelihood(torch.from_numpy(tokens), P, row_of)
    p, posterior = data_synth.bayes_filter(lik, hazard, repeats)
    logp, posterior = p.log().T.numpy(), posterior.transpose(0, 1).numpy()
    assert logp.shape == (200, 13) and posterior.shape == (200, 14, 3)
    np.testing.assert_allclose(posterior.sum(2), 1, atol=1e-12)
    assert abs(logp.mean() - exact.mean()) < 3e-4 and abs(posterior - belief).mean() < 5e-3
    end = 14 if most == 2 else 6        # exact with one boundary: none is forgotten; two need 6 tokens before them
    np.testing.assert_allclose(logp[:, :end - 1], exact[:, :end - 1], atol=1e-6)
    np.testing.assert_allclose(posterior[:, :end], belief[:, :end], atol=1e-6)

@each_chain
def test_references(tmp_path, chain):
    flags = (*SMALL, '--vocab_size=256', *CHAINS[chain])
    data = build(tmp_path, *flags, '--eval_rows=80')
    loss = data.meta['references']
    assert loss['oracle'] < loss['filter'] < loss['bigram'] < loss['uniform'] == pytest.approx(np.log(256))
    assert data.meta['reference_rows'] == 80 and data.val_posterior.shape == (100, 64, 3)
    tables, _, _, row_of = tables_of(*flags)
    x, z, full = data.val[:80].astype(int), data.val_topics[:80].astype(int), tables[:, row_of]
    p = full[:, x[:, :-1], x[:, 1:]]                                        # [T, 80, 63]
    assert loss['oracle'] == pytest.approx(-np.log(np.take_along_axis(p, z[None, :, 1:], 0)).mean(), abs=1e-6)
    frequency = np.stack([np.linalg.matrix_power(m[3:, 3:] if chain == 'range' else m, 64)[0] for m in full])
    post = (frequency / frequency.sum(0))[:, x[:, :-1] - 3 * (chain == 'range')]
    assert loss['bigram'] == pytest.approx(-np.log((post * p).sum(0)).mean(), abs=1e-5)
    right = data.val_posterior.argmax(2) == data.val_topics                # best far from a boundary
    assert right[:, 6:].mean() > 0.6 > 0.45 > right[:, 0].mean()

# what seed 0 has meant from the beginning: train, train_topics, val, val_topics, and the filter's loss
FROZEN = {
    'range': ('507757bc55e890ce', '39a15d1e6817202f', '15030e58939018b9', '509df07bdb765fce', 3.033664),
    'group': ('6f06aa2f8170be85', '084cdd5d9ec536c3', 'a68da874cbb8c8c4', '308e3458dc70fb00', 3.836029)}

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU'))])
@each_chain
def test_a_seed_is_these_bytes(tmp_path, chain, device):
    at = f'--device={device}'
    a = build(tmp_path / 'a', *CHAINS[chain], '--train_rows=25100', at)     # more than share a random stream
    assert [shards.digest(getattr(a, name)) for name in NAMES] == list(FROZEN[chain][:4])
    assert a.meta['references']['filter'] == pytest.approx(FROZEN[chain][4], abs=1e-6)
    assert (a.train[:100, 0] == a.val[:, 0]).mean() < 0.2                   # validation rows: a stream of their own
    b = build(tmp_path / 'b', *CHAINS[chain], '--train_rows=77', '--min_segments=1', '--max_segments=1', at)
    for name in ('val', 'val_topics', 'val_posterior'):                     # whatever the training rows are
        assert (getattr(a, name) == getattr(b, name)).all()
    assert (b.train_topics == b.train_topics[:, :1]).all() and len(b.train) == 77
    if chain == 'group':                                                    # repeats=False: 2-5 runs of at least 8
        assert set((np.diff(b.val_topics.astype(int), axis=1) != 0).sum(1) + 1) == {2, 3, 4, 5}

def test_there_already_or_with_other_parameters(tmp_path, capsys):
    data = build(tmp_path)
    assert data.meta['rows'] == {'train': 300, 'val': 100} and len(data.meta['files']) == 5
    for name, entry in data.meta['files'].items():
        raw = (tmp_path / 'seed0' / name).read_bytes()
        assert entry == {'bytes': len(raw), 'sha256': hashlib.sha256(raw).hexdigest()}
    before = os.stat(f'{tmp_path}/seed0/val.bin').st_mtime_ns
    build(tmp_path)
    assert 'is there' in capsys.readouterr().out and os.stat(f'{tmp_path}/seed0/val.bin').st_mtime_ns == before
    refused('n_topics is 3 there, 4 here; concentration is 5.0 there, 9.0 here', build, tmp_path, '--n_topics=4',
            '--concentration=9')
    refused('--data_script=', data_synth.main, config(f'--data_dir={tmp_path}/seed0', *SMALL))
    assert sorted(os.listdir(tmp_path)) == ['.seed0.lock', 'seed0'] and 'seed0' not in os.listdir(tmp_path / 'seed0')
    (tmp_path / 'seed1').mkdir()
    refused('is no dataset', build, tmp_path, '--seed=1')
    refused('cannot be written', build, '/proc/x')         # where even root may not write

META = {'vocab_size': 10, 'block_size': 4, 'n_topics': 2}       # somebody's own labelled tokens: rows of 5
OWN = {'train': np.arange(30).reshape(6, 5) % 10, 'train_topics': np.arange(30).reshape(6, 5) % 2,
       'val': np.arange(10).reshape(2, 5), 'val_topics': np.arange(10).reshape(2, 5) % 2}

def test_own_tokens(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{}')
    shards.write(tmp_path / 'x', OWN, META, {'tokenizer.json': tmp_path})
    refused('is there already', shards.write, tmp_path / 'x', OWN, META)
    other = tmp_path / f'z.tmp-{os.getpid()}'
    other.mkdir()
    refused('cannot be written', shards.write, tmp_path / 'z', OWN, META)      # not ours: neither used nor deleted
    other.rmdir()
    os.mkdir(tmp_path / 'y')                                # or by hand: four files and the three numbers
    for name, array in OWN.items():
        array.astype(shards.DTYPES[name]).tofile(tmp_path / 'y' / f'{name}.bin')
    (tmp_path / 'y' / 'meta.json').write_text(json.dumps(META))
    for data in map(shards.read, (tmp_path / 'x', tmp_path / 'y')):
        assert all((getattr(data, name) == OWN[name]).all() for name in NAMES) and data.val_posterior is None
        assert data.train.dtype == np.uint16 and data.val_topics.dtype == np.uint8
    (tmp_path / 'x/tokenizer.json').write_text('{"other": 1}')
    refused('tokenizer.json: missing, or not the 2 bytes', shards.read, tmp_path / 'x')
    for name, line in (('val_topics.bin', 'val_topics.bin: missing'), ('meta.json', 'python data_synth.py config/')):
        os.remove(tmp_path / 'y' / name)
        refused(line, shards.read, tmp_path / 'y')

@pytest.mark.parametrize('change, line', (
    (dict(train=OWN['train'] + 65530), 'train.bin: must hold integers from 0 to 65535'),
    (dict(train=OWN['train'] - 5), 'train.bin: must hold integers'),
    (dict(val=OWN['val'] * 0.5), 'val.bin: must hold integers'),
    (dict(val_topics=OWN['val_topics'] + 2), 'val_topics.bin: holds 3, but meta.json has n_topics = 2'),
    (dict(train_topics=OWN['train_topics'][:5]), 'has 25 bytes, not whole rows of [5] uint8, as many as train.bin'),
    (dict(train=OWN['train'].ravel()), "cannot write 'train' of shape (30,)"),
    (dict(val=OWN['val'][:0], val_topics=OWN['val'][:0]), 'val.bin: has 0 bytes'),
    (dict(val_posterior=np.zeros((2, 5, 3))), 'val_posterior.bin: has 60 bytes, not whole rows of [5, 2] float16'),
    (('train.bin', bytes(59)), 'train.bin: missing, or not the 60 bytes'),      # of a dataset that is there
    (('val.bin', b'\x0a\0' * 10), 'val.bin: holds 10, but meta.json has vocab_size = 10'),
    (('meta.json', b'{"vocab_size": 10'), 'meta.json: cannot be read as JSON'),
    (('meta.json', b'[1]'), 'meta.json: needs vocab_size'),
    (('meta.json', json.dumps(META | {'n_topics': '2'}).encode()), 'meta.json: needs n_topics')))
def test_the_bad_file_is_named(tmp_path, change, line):
    if isinstance(change, dict):
        refused(line, shards.write, tmp_path / 'x', OWN | change, META)
        assert not os.listdir(tmp_path)                     # nothing is left behind
    else:
        shards.write(tmp_path / 'x', OWN, META)
        (tmp_path / 'x' / change[0]).write_bytes(change[1])
        refused(line, shards.read, tmp_path / 'x')
