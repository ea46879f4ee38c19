"""The linear operator against the model it is of, against brute force, and on attention planted by hand."""
import itertools
import json
import os

import numpy as np
import pytest
import torch

import measures
import shards
from model import Qwen3, load
from tensor_lens import (GATES, contributions, frozen, operator, readout, token_contributions, topic_parts,
                         within_shares)
from test_measures import make_rows
from test_model import tiny
from test_smoke import refuses
from test_train import TINY, run

torch.set_num_threads(1)                                        # small tensors: more threads only wait
CASES = list(itertools.product(('mha', 'gqa 2:1', 'gqa 3:1'), (True, False), GATES))

def case(shape='gqa 2:1', rope=True, T=12):
    """A 3-layer model in fp64, its norm gains drawn too, rows of tokens and random topics."""
    model, idx = tiny(shape, rope)
    z = torch.randint(0, 3, (3, T), generator=torch.Generator().manual_seed(1))
    return model.double().requires_grad_(False), idx[:, :T], z

def states(model, idx):
    """What the model itself computes: hidden states at every depth of `frozen`, and logits."""
    hidden = [x for x, _ in model.trace(idx)]
    return [*hidden, model.model.norm(hidden[-1])], model(idx)

def rebuilds(operators, model, idx, tolerance=1e-10):
    """Whether T x is the model's state at every depth, and W_E T x its logits; idx [T]."""
    x, (hidden, logits) = model.model.embed_tokens(idx), states(model, idx[None])
    made = [torch.einsum('injm,jm->in', op, x) for op in operators]
    near = [(a - b[0]).abs().max() < tolerance for a, b in zip(made, hidden, strict=True)]
    return all(near) and (model.model.embed_tokens.weight @ made[-1].mT - logits[0].mT).abs().max() < tolerance

# -----------------------------------------------------------------------------
# exactness, in fp64

@pytest.mark.parametrize('shape, rope, gate', CASES)
def test_parts_add_up_to_the_model(shape, rope, gate):
    model, idx, z = case(shape, rope)
    hidden, logits = states(model, idx)
    assert logits.std() > 0.5                                   # the comparison is of something
    for (mine, parts, _), whole in zip(topic_parts(model, idx, z[..., None], 3, gate), hidden, strict=True):
        assert (mine - whole).abs().max() < 1e-10 and (parts.sum(3)[:, :, 0] - whole).abs().max() < 1e-10
    of_topics = parts[:, :, 0] @ model.model.embed_tokens.weight.mT                        # [B, T, K, vocab]
    assert (of_topics.sum(2) - logits).abs().max() < 1e-10 and of_topics[:, -1].abs().amax(-1).min() > 1e-3

@pytest.mark.parametrize('shape, rope, gate', CASES)
def test_operator_rebuilds_the_model(shape, rope, gate):
    model, idx, z = case(shape, rope, T=8)
    T = operator(model, idx[0], gate)
    assert rebuilds(T, model, idx[0])
    later = torch.ones(8, 8).triu(1).bool()                     # causal: nothing from later tokens, something from all
    for depth, op in enumerate(T):                              # of the others, but the embedding is of itself alone
        size = op.abs().amax((1, 3))
        assert (size[later] == 0).all() and (size[~later].min() > 0 or depth == 0)
    # by topic, and of the position's own token: the same as sums of blocks of T
    x = model.model.embed_tokens(idx[:1])
    for op, (_, parts, own) in zip(T, topic_parts(model, idx[:1], z[:1, :, None], 3, gate), strict=True):
        blocks = torch.einsum('injm,jm->ijn', op, x[0])
        for k in range(3):
            assert (blocks[:, z[0] == k].sum(1) - parts[0, :, 0, k]).abs().max() < 1e-10
        assert (blocks.diagonal().mT - own[0]).abs().max() < 1e-10

@pytest.mark.parametrize('rope', (True, False))
def test_unfrozen_jacobian_fails(rope):
    """The derivative of the model itself is another operator: norms, patterns and gates move with the input."""
    model, idx, _ = case(rope=rope, T=8)
    def depths(x):
        out, positions = [x], model.positions(8)
        for block in model.model.layers:
            out.append(block(out[-1][None], positions)[0])
        return (*out, model.model.norm(out[-1]))
    x = model.model.embed_tokens(idx[0])
    assert all((a - b[0]).abs().max() < 1e-6 for a, b in zip(depths(x), states(model, idx[:1])[0], strict=True))
    jacobian = torch.autograd.functional.jacobian(depths, x)
    assert not rebuilds(jacobian, model, idx[0], tolerance=0.1) and rebuilds(operator(model, idx[0]), model, idx[0])

def test_the_two_gates_attribute_differently():
    model, idx, z = case()
    ends = [list(topic_parts(model, idx, z[..., None], 3, gate))[-1] for gate in GATES]
    assert torch.equal(ends[0][0], ends[1][0]) and (ends[0][1] - ends[1][1]).abs().max() > 0.1

@pytest.mark.parametrize('gate', GATES)
def test_token_contributions_are_rows_of_t(gate):
    model, idx, _ = case('gqa 3:1', T=8)
    x, T = model.model.embed_tokens(idx[0]), operator(model, idx[0], gate)[-1]
    for position, target in ((7, 3), (4, 40)):
        found = token_contributions(model, idx[0], position, target, gate)
        assert torch.allclose(found, torch.einsum('n,njm,jm->j', readout(model)[target], T[position], x), atol=1e-10)
        logits = model(idx[:1])[0, position]
        assert found.sum().item() == pytest.approx((logits[target] - logits.mean()).item(), abs=1e-10)
        assert (found[position + 1:] == 0).all() and (found[:position + 1] != 0).all()

# -----------------------------------------------------------------------------
# within-topic contributions and their chance level

def shares(model, tokens, z, draws=5, gate='silu', K=3, size=2):
    labels, rows = measures.exchanged(z, draws, torch.Generator().manual_seed(0))
    labels = torch.cat([z[None], labels])
    sums, by_topic, positions = contributions(model, tokens, labels, rows, K, gate, size)
    return within_shares(sums), labels, rows, by_topic / positions[:, None]

def test_exchange_of_labels():
    z = make_rows(40, T=64, K=4, min_run=8, seed=0)
    z[-1] = torch.arange(64) % 4                                # 64 runs: no other row has as many
    drawn, rows = measures.exchanged(z, 30, torch.Generator().manual_seed(0))
    count = measures.runs(z)[1]
    assert rows.tolist() == [True] * 39 + [False] and (drawn[:, -1] == z[-1]).all()
    sources = [(drawn[:, i, None] == z).all(-1) for i in range(40)]            # [draws, 40] whose labels row i gets
    for i, source in enumerate(sources[:-1]):
        assert (source.sum(1) == 1).all() and not source[:, i].any() and source.any(0).sum() > 1
        assert (count[source.any(0)] == count[i]).all()
    assert all(torch.equal(d.sort(0).values, z.sort(0).values) for d in drawn)             # all labels are used
    assert torch.equal(drawn, measures.exchanged(z, 30, torch.Generator().manual_seed(0))[0])

@pytest.mark.parametrize('gate', GATES)
def test_shares_equal_brute_force(gate):
    """Every share, of the true labels and of every draw, by loops over T."""
    model, idx, _ = case(T=11)
    z = torch.tensor([[0] * 4 + [1] * 3 + [0] * 4, [2] * 2 + [1] * 5 + [0] * 4, [1] * 5 + [0] * 6])
    idx, z = torch.cat([idx, idx.flip(1)]), torch.cat([z, z.flip(1)])[:, :10]
    found, labels, rows, by_topic = shares(model, idx, z, draws=3, gate=gate)
    assert rows.all() and {len(v) for v in found.values()} == {6}
    embed, read = model.model.embed_tokens, readout(model)
    T, hidden = [operator(model, row[:-1], gate) for row in idx], states(model, idx[:, :-1])[0]
    compared = 0
    for m, depth in itertools.product(range(4), range(6)):
        sums = dict.fromkeys(('n', 'whole', 'mine', 'rest', 'mine_rest', 'norm', 'rest_norm'), 0.0)
        table = np.zeros((3, 3)), np.zeros(3)
        for b, i in itertools.product(range(6), range(10)):
            label, h = labels[m, b], hidden[min(depth, 4)][b, i]
            if len(label[:i + 1].unique()) == 1:
                continue                                        # all before it is of its topic: no choice
            tokens = [T[b][min(depth, 4)][i, :, j] @ embed(idx[b, j]) for j in range(10)]
            part = [sum([t for j, t in enumerate(tokens) if label[j] == k], 0 * h) for k in range(3)]
            others = [p - tokens[i] * (k == label[i]) for k, p in enumerate(part)]
            against, own = (h / (h @ h), label[i]) if depth < 5 else (read[idx[b, i + 1]], label[i])
            sums['n'] += 1
            sums['whole'] += float(h @ against)
            sums['mine'] += float(part[own] @ against)
            sums['rest'] += float((h - tokens[i]) @ against)
            sums['mine_rest'] += float(others[own] @ against)
            sums['norm'] += float(part[own].norm() / sum(p.norm() for p in part))
            sums['rest_norm'] += float(others[own].norm() / max(sum(p.norm() for p in others), 1e-9))
            table[0][own] += [float(p @ against) for p in part]
            table[1][own] += 1
        expected = {'projection': ('mine', 'whole'), 'projection_others': ('mine_rest', 'rest'), 'norm': ('norm', 'n'),
                    'norm_others': ('rest_norm', 'n')}
        for name, (above, below) in expected.items():
            if depth == 0 and 'others' in name:                 # nothing but the token itself
                assert found[name][depth, m].isnan()
            elif sums[below] < 0.01 * sums['n']:                # a mean logit of nothing
                assert found[name][depth, m].isnan()
            elif depth < 5 or 'norm' not in name:               # a logit has no norm
                value = sums[above] / sums[below]
                assert found[name][depth, m].item() == pytest.approx(value, abs=1e-9), (name, depth, m)
                compared += 1
        if m == 0 and depth < 5:
            assert np.allclose(by_topic[depth], table[0] / table[1][:, None], atol=1e-9)
    assert compared > 4 * 18

def planted(topical, reads_topic=False):
    """One layer, no positions, no MLP; topic = token // 10 is in entries 0-3 of the embedding, noise in the others.
    The noise of a topic's tokens adds up to 0, or else they would resemble each other.
    topical: attention on the own topic, else uniform. reads_topic: values carry the topic's entries too."""
    g = torch.Generator().manual_seed(0)
    model = Qwen3(40, 128, n_layer=1, n_head=1, n_kv_head=1, n_embd=20, head_dim=20, mlp_hidden=8, rope=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float(p.ndim == 1))
        attn, W = model.model.layers[0].self_attn, model.model.embed_tokens.weight
        noise = torch.randn(4, 10, 16, generator=g)
        noise = (noise - noise.mean(1, keepdim=True)).flatten(0, 1)
        W.copy_(torch.cat([torch.eye(4).repeat_interleave(10, 0) * 2, noise], 1))
        attn.v_proj.weight.copy_(torch.eye(20))
        attn.o_proj.weight.copy_(torch.eye(20) * 3)
        if not reads_topic:
            attn.v_proj.weight[:4] = 0
        if topical:
            for proj in (attn.q_proj, attn.k_proj):
                proj.weight[:4, :4] = torch.eye(4)
    return model.double().requires_grad_(False)

def planted_rows(n=150):
    z = make_rows(n, T=65, K=4, min_run=8, seed=3)              # 2-5 runs, all topics as likely
    return z * 10 + torch.randint(0, 10, z.shape, generator=torch.Generator().manual_seed(2)), z[:, :-1]

def excess(model, tokens, z):
    """value - chance after the last layer, and its size in standard deviations of the draws, of every share."""
    found = {k: v[-3] for k, v in shares(model, tokens, z, draws=12, K=4, size=50)[0].items()}
    return {k: ((v[0] - v[1:].mean()).item(), ((v[0] - v[1:].mean()) / v[1:].std()).item()) for k, v in found.items()}

def test_planted_truth():
    """Uniform attention is at chance, attention on the own topic is above."""
    blind, topical = (excess(planted(t), *planted_rows()) for t in (False, True))
    for name in blind:
        print(f'{name}: uniform {blind[name]}, topical {topical[name]}')
        assert abs(blind[name][0]) < 0.04 and abs(blind[name][1]) < 4
        assert topical[name][0] > 0.05 and topical[name][1] > 8

def test_untrained_model_and_random_labels_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    model = Qwen3(40, 64, 2, 4, 2, 32, 8, 40, generator=generator).double().requires_grad_(False)
    for p in model.model.layers.parameters():
        p.mul_(5 if p.ndim == 2 else 1)                         # layers that matter beside the embedding
    tokens = torch.randint(0, 40, (150, 65), generator=generator)              # say nothing of the topics
    for name, (difference, sd) in excess(model, tokens, planted_rows()[1]).items():
        assert abs(sd) < 4 and abs(difference) < 0.02, name

def test_what_fools_it():
    """Uniform attention that carries what tokens tell of their topic rises above chance all the same."""
    fooled = excess(planted(False, reads_topic=True), *planted_rows())
    print(fooled)
    assert fooled['projection_others'][0] > 0.05 and fooled['projection_others'][1] > 5

# -----------------------------------------------------------------------------
# the script

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A tiny trained run on 20 + 20 rows of 4 topics, the last of which no row has."""
    here, rng = str(tmp_path_factory.mktemp('lens')), np.random.default_rng(0)
    z = make_rows(220, T=49, K=3, min_run=9, seed=0).numpy()
    tokens = (rng.integers(0, 5, z.shape) + 4 * z + np.arange(49) % 3) % 20
    shards.write(f'{here}/data', dict(train=tokens[20:], train_topics=z[20:], val=tokens[:20], val_topics=z[:20]),
                 dict(vocab_size=20, block_size=48, n_topics=4))
    done = run('train.py', *TINY, f'--data_dir={here}/data', '--max_iters=80', f'--run={here}/run')
    assert done.returncode == 0, done.stderr
    return here

def strict(path):
    return json.load(open(path), parse_constant=lambda s: pytest.fail(f'{s} in {path}'))

def test_parts_add_up_in_fp32(trained):
    model, data = load(f'{trained}/run'), shards.read(f'{trained}/data')
    idx, z = (torch.from_numpy(a[:, :-1].astype(np.int64)) for a in (data.val, data.val_topics))
    assert model.model.layers[0].mlp.up_proj.weight.std() > 0.1                 # it has trained, 0.02 at init
    with torch.no_grad():
        hidden, logits = states(model, idx)
        for gate in GATES:
            for (_, parts, _), whole in zip(topic_parts(model, idx, z[..., None], 4, gate), hidden, strict=True):
                assert (parts.sum(3)[:, :, 0] - whole).abs().max() < 1e-4
            assert (parts.sum(3)[:, :, 0] @ model.model.embed_tokens.weight.mT - logits).abs().max() < 1e-4

def test_script(trained):
    path = f'{trained}/run/lens.json'
    done = run('tensor_lens.py', f'--run={trained}/run', '--lens_rows=16', '--lens_row=17', '--lens_position=40',
               '--lens_gate=up')
    assert done.returncode == 0 and 'within-topic contribution' in done.stdout, done.stderr
    lens, data = strict(path), shards.read(f'{trained}/data')
    assert not [name for name in os.listdir(f'{trained}/run') if 'tmp' in name]
    assert lens['depths'] == ['embedding', 'layer 1', 'layer 2', 'norm', 'logit']
    assert lens['settings']['lens_rows'] == 16
    for gate in GATES:
        found = lens['within'][gate]
        assert found['projection']['value'][0] == found['projection']['chance'][0] == 1
        assert all(0 < v < 1 for v in found['norm']['value'][1:]) and found['norm_others']['value'][0] is None
        assert [len(found[name]['value']) for name in ('projection', 'projection_others', 'norm')] == [5, 5, 4]
        for table in found['by_topic']:                         # rows: topics of positions; the last has none
            assert table[3] == [None] * 4 and all(sum(r) == pytest.approx(1, abs=1e-4) and r[3] == 0 for r in table[:3])
    assert lens['within']['silu']['norm']['value'] != lens['within']['up']['norm']['value']
    for name, difference in lens['gate_difference'].items():
        a, b = ([None if v is None or c is None else v - c for v, c in zip(w['value'], w['chance'])]
                for w in (lens['within'][g][name] for g in ('up', 'silu')))
        expected = [None if u is None or v is None else u - v for u, v in zip(a, b)]
        assert [d is None for d in difference] == [e is None for e in expected]
        assert np.allclose([d for d in difference if d is not None], [e for e in expected if e is not None], atol=1e-5)
    strip = lens['strip']
    assert strip['tokens'] == data.val[17, :41].tolist() and strip['topics'] == data.val_topics[17, :41].tolist()
    logits = load(f'{trained}/run')(torch.from_numpy(data.val[17:18, :41].astype(np.int64)))[0, -1].detach()
    logit = (logits[int(data.val[17, 41])] - logits.mean()).item()
    assert strip['target'] == data.val[17, 41] and strip['logit'] == pytest.approx(logit, abs=1e-3)
    for gate in GATES:
        assert sum(strip['contribution'][gate]) == pytest.approx(logit, abs=5e-3)
    again = run('tensor_lens.py', f'--run={trained}/run', '--lens_rows=16', '--lens_gate=up')
    assert again.returncode == 0 and strict(path)['within'] == lens['within']              # draws from the run's seed

@pytest.mark.parametrize('args, words', (
    ([], ('--run=FOLDER',)),
    (['--run=RUN/none'], ('none', 'no run here')),
    (['--run=RUN', '--lens_row=20'], ('lens_row = 20', '0 to 19')),
    (['--run=RUN', '--lens_row=-1'], ('lens_row = -1', '0 to 19')),
    (['--run=RUN', '--lens_position=48'], ('lens_position = 48', '0 to 47')),
    (['--run=RUN', '--lens_gate=sigmoid'], ("'sigmoid'", "'silu'")),
    (['--run=RUN', '--lens_rows=1'], ('lens_rows = 1', 'at least 2')),
    (['--run=RUN', '--lens_draws=0'], ('lens_draws = 0',)),
    (['--run=RUN', '--row=3'], ("'row'",))))
def test_bad_input(trained, args, words):
    path = f'{trained}/run/lens.json'
    if os.path.exists(path):
        os.remove(path)
    refuses(run('tensor_lens.py', *(a.replace('RUN', f'{trained}/run') for a in args)), *words)
    assert not os.path.exists(path)

def test_no_choice_and_one_draw(trained):
    """Rows of one topic each: no position has a choice, so every share is null; one draw has no spread."""
    z = np.repeat(np.arange(20) % 3, 49).reshape(20, 49)
    tokens = shards.read(f'{trained}/data').val
    shards.write(f'{trained}/single', dict(train=tokens, train_topics=z, val=tokens, val_topics=z),
                 dict(vocab_size=20, block_size=48, n_topics=4))
    run('train.py', *TINY, f'--data_dir={trained}/single', '--max_iters=4', f'--run={trained}/other')
    done = run('tensor_lens.py', f'--run={trained}/other', '--lens_draws=1')
    assert done.returncode == 0 and '— (chance —)' in done.stdout, done.stderr
    within = strict(f'{trained}/other/lens.json')['within']['silu']
    assert within['projection']['value'] == [None] * 5 and within['projection']['chance_sd'] is None
