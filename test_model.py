"""The model and the optimizer against independent references: transformers' Qwen3, SDPA, torch.optim.Muon."""
import functools
import itertools
from unittest.mock import Mock

import pytest
import torch

import export_hf
from model import build, causal_bias
from optim import Muon

SHAPES = {                  # n_head, n_kv_head, n_embd, head_dim, rope_theta
    'mha': (4, 4, 32, 8, 1e6), 'gqa 2:1': (4, 2, 32, 8, 1e6), 'gqa 3:1': (6, 2, 48, 8, 1e6),
    'wide heads': (4, 2, 32, 16, 1e6), 'theta 1e4': (4, 4, 32, 8, 1e4)}

def config(shape, rope=True, T=64):
    names = 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'rope_theta'
    return dict(zip(names, SHAPES[shape]), vocab_size=50, block_size=T, n_layer=3, mlp_hidden=40, rope=rope)

def tiny(shape='mha', rope=True, T=64):
    """A model with all its weights, norm gains too, drawn at random and large enough to matter."""
    g = torch.Generator().manual_seed(0)
    model = build(config(shape, rope, T), g)
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
