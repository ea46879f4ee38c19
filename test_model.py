"""
The model and the optimizer against independent references: transformers' Qwen3, SDPA, torch.optim.Muon; and the linear
operator against the model it is of, against brute force, and on attention planted by hand.
"""
import functools
import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import export_hf
import measures
import runs
import shards
import tensor_lens
from model import build, causal_bias, load
from optim import Muon
from tensor_lens import carried, own_topic_shares, topic_parts
from test_measures import make_rows
from test_train import dataset, run, succeeds, two_runs                         # noqa: F401 (dataset is a fixture)

SHAPES = {                  # n_head, n_kv_head, n_embd, head_dim, rope_theta
    'mha': (4, 4, 32, 8, 1e6), 'gqa 2:1': (4, 2, 32, 8, 1e6), 'gqa 3:1': (6, 2, 48, 8, 1e6),
    'wide heads': (4, 2, 32, 16, 1e6), 'theta 1e4': (4, 4, 32, 8, 1e4)}

def config(shape, rope=True, T=64):
    names = 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'rope_theta'
    return dict(zip(names, SHAPES[shape]), vocab_size=50, block_size=T, n_layer=3, mlp_hidden=40, rope=rope)

def tiny(shape='mha', rope=True, T=64):
    """A model with all its weights, norm gains too, drawn at random and large enough to matter."""
    g = torch.Generator().manual_seed(0)
    model = build(config(shape, rope, T))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.15 if p.ndim == 2 else 0.3) + (p.ndim == 1))
    return model, torch.randint(0, 50, (3, T), generator=g)

@pytest.mark.parametrize('shape, rope', list(itertools.product(SHAPES, (True, False))))
def test_logits_equal_hugging_face_and_explicit_attention(shape, rope):
    from transformers import Qwen3Config, Qwen3ForCausalLM  # slow to import, and only needed here
    model, idx = tiny(shape, rope, T=512)                   # rounded angles would differ most at the end
    hf = Qwen3ForCausalLM(Qwen3Config.from_dict(export_hf.qwen3_config(config(shape, rope, T=512)))).eval()
    missing, unexpected = hf.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {'lm_head.weight'} and not unexpected
    with torch.no_grad():
        ours, theirs = model(idx), hf(idx).logits
    assert ours.std() > 0.5 and model.stock_positions()     # the comparison is of something
    assert (ours - theirs).abs().max() < 1e-5
    *_, (hidden, pattern) = model.double().trace(idx)
    assert (model(idx) - model.head(hidden)).abs().max() < 1e-10
    assert torch.allclose(pattern.sum(-1), torch.ones((), dtype=float), atol=1e-6)

def fork(model, layer, T):
    """Other positions: RoPE in even layers, ALiBi with windows of 2 to 8 tokens in odd ones."""
    if layer % 2 == 0:
        return (model.cos[:T], model.sin[:T]), None
    distance = torch.arange(T)[:, None] - torch.arange(T)
    heads = torch.arange(1, 5)[:, None, None]
    bias = causal_bias(T) - 2.0 ** -heads * distance        # [4, T, T]
    return None, bias.masked_fill(distance >= 2 * heads, float('-inf'))

def test_positions_are_in_one_place():
    """Training's path, the written-out pattern, the allowed keys and the check before an export follow that method."""
    model, idx = tiny('gqa 2:1')
    model.positions = functools.partial(fork, model)
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    for layer, allowed in enumerate((causal, causal.triu(-7))):
        assert torch.equal(model.allowed(layer, 64), allowed)
        assert torch.equal((list(model.trace(idx))[layer + 1][1] > 0).any(0).any(0), allowed)
    *_, (hidden, _) = model.trace(idx)
    assert (model.head(hidden) - model(idx)).abs().max() < 1e-5
    assert (list(model.trace(idx, causal=False))[2][1] > 0).all()      # no mask and no window
    with torch.autocast('cpu', torch.bfloat16):
        assert (model(idx) - model.head(hidden)).abs().max() < 0.3
    rope = (model.cos, model.sin)
    for other in ((rope, causal_bias(64)), (None, None), ((-rope[0], rope[1]), None)):
        model.positions = Mock(side_effect=[(rope, None), other, (rope, None)])          # of the three layers
        assert not model.stock_positions()

def test_muon_is_torch_muon():
    """Five steps, tall, wide and square, with decay and a changing rate: momentum to the bit, weights to rounding."""
    g = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 48), (32, 32), (48, 16), (32, 32), (16, 48), (48, 16)]
    ours = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    muon = Muon(ours, lr=0.02, weight_decay=0.01)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.01)
    for step in range(5):
        reference.param_groups[0]['lr'] = 0.02 / (step + 1)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        muon.take_gradients()
        muon.step(torch.tensor(1 / (step + 1)), torch.ones(()))
        reference.step()
    momentum = {p: m for stack in muon.stacks for p, m in zip(stack.params, stack.momentum)}
    for p, q in zip(ours, theirs):
        assert torch.equal(momentum[p], reference.state[q]['momentum_buffer']) and (p - q).abs().max() < 2e-6

# -----------------------------------------------------------------------------
# the linear operator

CASES = [*itertools.product(('mha', 'gqa 2:1', 'gqa 3:1'), (True, False)), ('gqa 2:1', 'fork')]

def case(shape='gqa 2:1', rope=True, T=8):
    """A 3-layer model in fp64, its norm gains drawn too, 3 rows of tokens and random topics."""
    model, idx = tiny(shape, rope)
    z = torch.randint(0, 3, (3, T), generator=torch.Generator().manual_seed(1))
    return model.double().requires_grad_(False), idx[:, :T], z

def states(model, idx):
    """What the model itself computes: hidden states at every depth of `carried`."""
    hidden = [x for x, _ in model.trace(idx)]
    return [*hidden, model.model.norm(hidden[-1])]

def operator(model, idx):
    """T itself: [T, n_embd, T, n_embd] (state, its entry, token, its entry) of one row idx [T], at each depth."""
    T, W = len(idx), model.model.embed_tokens.weight
    n, found = W.size(1), []
    parts = torch.eye(T * n).to(W).view(1, T, n, T * n).mT      # every entry of every token apart
    for _, parts, _ in carried(model, idx[None], parts):        # [1, T, T * n_embd, n_embd]
        found.append(parts[0].mT.unflatten(-1, (T, n)))
    return found

def rebuilds(operators, model, idx, tolerance=1e-10):
    """Whether T x is the model's state at every depth, and W_E T x its logits; idx [T]."""
    W = model.model.embed_tokens.weight
    made = [torch.einsum('injm,jm->in', op, W[idx]) for op in operators]
    wanted = [*states(model, idx[None]), model(idx[None])]
    return all((a - b[0]).abs().max() < tolerance for a, b in zip([*made, made[-1] @ W.mT], wanted, strict=True))

@pytest.mark.parametrize('shape, rope', CASES)
def test_operator_rebuilds_the_model(shape, rope):
    model, idx, z = case(shape, rope)
    if rope == 'fork':                                          # ALiBi in the second layer
        model.positions = functools.partial(fork, model)
    T = operator(model, idx[0])
    assert rebuilds(T, model, idx[0])
    later = torch.ones(8, 8).triu(1).bool()                     # causal: nothing from later tokens, something of all
    for depth, op in enumerate(T):                              # others, but the embedding is of itself alone
        size = op.abs().amax((1, 3))
        assert (size[later] == 0).all() and (size[~later].min() > 0 or depth == 0)
    # by topic, and of the position's own token: the same as sums of blocks of T, and in all rows parts of the whole
    x = model.model.embed_tokens(idx[:1])
    split = topic_parts(model, idx, z[..., None], 3)
    for op, (_, parts, own), whole in zip(T, split, states(model, idx), strict=True):
        blocks = torch.einsum('injm,jm->ijn', op, x[0])
        for k in range(3):
            assert (blocks[:, z[0] == k].sum(1) - parts[0, :, 0, k]).abs().max() < 1e-10
        assert (blocks.diagonal().mT - own[0]).abs().max() < 1e-10
        assert (parts[:, :, 0].sum(2) - whole).abs().max() < 1e-10
    assert model(idx).std() > 0.5                               # the comparison is of something

@pytest.mark.parametrize('rope', (True, False))
def test_unfrozen_jacobian_fails(rope):
    """The derivative of the model itself is another operator: norms, patterns and gates move with the input."""
    model, idx, _ = case(rope=rope)
    def depths(x):
        out = [x]
        for layer, block in enumerate(model.model.layers):
            out.append(block(out[-1][None], *model.positions(layer, 8))[0])
        return (*out, model.model.norm(out[-1]))
    jacobian = torch.autograd.functional.jacobian(depths, model.model.embed_tokens(idx[0]))
    assert not rebuilds(jacobian, model, idx[0], tolerance=0.1) and rebuilds(operator(model, idx[0]), model, idx[0])

NAMES = ('projection', 'projection_others')

def test_exchange_of_labels():
    z = make_rows(40, T=64, K=4, min_run=8, seed=0)
    z[-1] = torch.arange(64) % 4                                # 64 runs: no other row has as many
    drawn, rows = measures.exchanged(z, 30, torch.Generator().manual_seed(0))
    assert rows.tolist() == [True] * 39 + [False] and (drawn[:, -1] == z[-1]).all()
    source = (drawn[:, :, None] == z).all(-1)[:, :39]           # [draws, 39, 40]: whose labels a row gets
    assert (source.sum(2) == 1).all() and not source.diagonal(0, 1, 2).any()
    of, count = source.any(0), measures.runs(z)[1]
    assert (of.sum(1) > 1).all() and (~of | (count == count[:39, None])).all()

def brute_force(model, idx, labels):
    """Both shares at every depth by loops over T, {name: [5 + 1]}, nan where undefined; labels [rows, T]."""
    T, hidden = [operator(model, row[:-1]) for row in idx], states(model, idx[:, :-1])
    embed, found = model.model.embed_tokens, {name: [] for name in NAMES}
    read = embed.weight - embed.weight.mean(0)
    for depth in range(6):
        at, sums = min(depth, 4), np.zeros(5)
        for (b, label), i in itertools.product(enumerate(labels), range(labels.shape[1])):
            if len(label[:i + 1].unique()) == 1:
                continue                                        # all before it is of its topic: no choice
            h = hidden[at][b, i]
            against = h / (h @ h) if depth < 5 else read[idx[b, i + 1]]
            tokens = [float(T[b][at][i, :, j] @ embed(idx[b, j]) @ against) for j in range(labels.shape[1])]
            mine = sum(t for j, t in enumerate(tokens) if label[j] == label[i])
            sums += 1, sum(tokens), mine, sum(tokens) - tokens[i], mine - tokens[i]
        for name, whole, part in zip(NAMES, sums[[1, 3]], sums[[2, 4]]):
            found[name].append(part / whole if whole > 0.01 * sums[0] else np.nan)
    return found

def test_shares_equal_brute_force():
    model, idx, _ = case(T=11)
    z = torch.tensor([[0] * 4 + [1] * 3 + [0] * 4, [2] * 2 + [1] * 5 + [0] * 4, [1] * 5 + [0] * 6])
    idx, z = torch.cat([idx, idx.flip(1)]), torch.cat([z, z.flip(1)])[:, :10]
    found = runs.plain(own_topic_shares(model, idx, z, 3, draws=3, seed=7))
    draws, rows = measures.exchanged(z, 3, torch.Generator().manual_seed(7))
    value, *chance = (brute_force(model, idx, labels) for labels in (z, *draws))
    for name in NAMES:
        drawn = np.array([c[name] for c in chance])
        expected = {'value': value[name], 'chance': drawn.mean(0), 'chance_sd': drawn.std(0, ddof=1)}
        for key, x in expected.items():
            np.testing.assert_allclose(np.array(found[name][key], float), x, rtol=0, atol=1e-9)
    assert found['projection_others']['value'][0] is None and rows.all()       # the embedding: only the token itself
    assert sum(v is not None for name in NAMES for v in found[name]['value']) >= 9

@pytest.mark.parametrize('share', (0.0095, 0.0105))
def test_too_little_to_share_is_null(share, monkeypatch):
    """Below a hundredth of the state that is not of the own token."""
    model, idx, z = case()
    sums = torch.tensor([1, 0.5, 1 - share]).view(3, 1).expand(6, 3, 3)        # whole, own topic, own token
    monkeypatch.setattr(tensor_lens, 'row_sums', lambda *_: sums)
    lens = runs.plain(own_topic_shares(model, idx, z, 3, draws=2, seed=0))
    assert (lens['projection_others']['value'][1] is None) == (share < 0.01)
    assert lens['projection']['value'] == pytest.approx([0.5] * 6)

def test_script(dataset, tmp_path, monkeypatch):
    """The row of a run has what own_topic_shares finds; the draws come from its seed; fp32 is precise enough."""
    monkeypatch.chdir(tmp_path)
    _, at = two_runs(dataset, 'mha_shuffled_rope/seed0')    # the one without RoPE
    succeeds(run('analyze.py', f'--run={at}'))
    data, lens = shards.read(dataset), runs.read_row(at)['lens']
    tokens, z = (torch.from_numpy(x.astype(int)) for x in (data.val, data.val_topics))
    found = runs.plain(own_topic_shares(load(at).double(), tokens, z[:, :-1], 3, 5, seed=0))
    for name, levels in found.items():
        for key, values in levels.items():
            assert np.array(lens[name][key], float) == pytest.approx(np.array(values, float), abs=1e-3, nan_ok=True)
