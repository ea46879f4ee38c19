"""The model and the optimizer against independent references: transformers' Qwen3, SDPA, torch.optim.Muon."""
import itertools

import numpy as np
import pytest
import torch

from analyze import ablated, ablation
from model import Qwen3
from train import Muon

SHAPES = {                  # n_head, n_kv_head, n_embd, head_dim, rope_theta
    'mha': (4, 4, 32, 8, 1e6), 'gqa 2:1': (4, 2, 32, 8, 1e6), 'gqa 3:1': (6, 2, 48, 8, 1e6),
    'wide heads': (4, 2, 32, 16, 1e6), 'theta 1e4': (4, 4, 32, 8, 1e4)}

def tiny(shape='mha', rope=True, seed=0, T=64):
    """A model with all its weights, norm gains too, drawn at random and large enough to matter."""
    n_head, n_kv_head, n_embd, head_dim, theta = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)
    model = Qwen3(vocab_size=50, block_size=T, n_layer=3, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                  head_dim=head_dim, mlp_hidden=40, rope=rope, rope_theta=theta, generator=g)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.15 if p.ndim == 2 else 0.3) + (p.ndim == 1))
    return model, torch.randint(0, 50, (3, T), generator=g)

def hugging_face(model, shape, rope):
    """Qwen3ForCausalLM of transformers with the same weights, under the same names."""
    import transformers                                     # slow to import, and only needed here
    n_head, n_kv_head, n_embd, head_dim, theta = SHAPES[shape]
    # a RoPE-free model is stock Qwen3 whose angles are divided by 1e30: cos = 1, sin = 0
    scaling = {'rope_type': 'default'} if rope else {'rope_type': 'linear', 'factor': 1e30}
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=n_embd, intermediate_size=40, num_hidden_layers=3, num_attention_heads=n_head,
        num_key_value_heads=n_kv_head, head_dim=head_dim, rms_norm_eps=1e-6, tie_word_embeddings=True,
        attention_bias=False, use_sliding_window=False, rope_parameters={**scaling, 'rope_theta': theta})
    hf = transformers.Qwen3ForCausalLM(config)
    missing, unexpected = hf.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {'lm_head.weight'} and not unexpected
    hf.tie_weights()
    return hf.eval()

@pytest.mark.parametrize('shape, rope', list(itertools.product(SHAPES, (True, False))))
def test_logits_equal_hugging_face(shape, rope):
    model, idx = tiny(shape, rope)
    with torch.no_grad():
        ours, theirs = model(idx), hugging_face(model, shape, rope)(idx).logits
    assert ours.std() > 0.5                                 # the comparison is of something
    assert (ours - theirs).abs().max() < 1e-5

@pytest.mark.parametrize('shape, rope', list(itertools.product(SHAPES, (True, False))))
def test_explicit_attention_equals_sdpa(shape, rope):
    model, idx = tiny(shape, rope)
    *_, (hidden, pattern) = model.trace(idx)
    assert (model.head(hidden) - model(idx)).abs().max() < 1e-5
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-6)

@pytest.mark.parametrize('rope', (True, False))
def test_patterns_are_causal(rope):
    """Changing a later token moves no earlier row of any pattern, and no pattern looks ahead."""
    model, idx = tiny('gqa 2:1', rope)
    changed, t = idx.clone(), 40
    changed[:, t:] = (changed[:, t:] + 1) % 50
    for (x, a), (y, b) in zip(model.trace(idx), model.trace(changed)):
        assert torch.equal(x[:, :t], y[:, :t]) and not torch.equal(x[:, t:], y[:, t:])
        if a is not None:
            assert torch.equal(a[:, :, :t], b[:, :, :t])
            assert not a.triu(1).any()
    a, b = (list(model.trace(i, causal=False))[1][1] for i in (idx, changed))
    assert not torch.equal(a[:, :, :t], b[:, :, :t])        # without the mask the same check fails

def test_constant_sequence_without_rope_gives_uniform_attention():
    model, idx = tiny('mha', rope=False)
    uniform = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    for _, pattern in list(model.trace(torch.full_like(idx, 7)))[1:]:
        assert (pattern - uniform).abs().max() < 1e-6
    model.rope = True                                       # the switch matters
    assert (list(model.trace(torch.full_like(idx, 7)))[1][1] - uniform).abs().max() > 1e-3

def test_ablated_heads_are_replaced():
    """By zeros: the same as a model whose o_proj does not read those heads; by its own output: the same model."""
    model, idx = tiny('gqa 2:1')
    before, D = model(idx), 8
    cut, _ = tiny('gqa 2:1')
    with torch.no_grad():
        for layer, h in ((0, 1), (2, 3)):
            cut.model.layers[layer].self_attn.o_proj.weight[:, h * D:(h + 1) * D] = 0
    zeros = {layer: torch.zeros(idx.size(1), 4 * D) for layer in range(3)}
    with ablated(model, zeros, [(0, 1), (2, 3)]):
        without = model(idx)
    assert torch.allclose(without, cut(idx), atol=1e-6) and (without - before).abs().max() > 1e-3
    assert torch.equal(model(idx), before)                  # the hooks are gone
    outputs = {}
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, a: outputs.update({1: a[0][0]}))
    model(idx[:1])
    hook.remove()
    with ablated(model, outputs, [(1, h) for h in range(4)]):
        assert torch.allclose(model(idx[:1]), before[:1], atol=1e-5)

def test_ablation_uses_the_halves():
    """The means come from the first half of the rows, the losses from the second; near is what follows a boundary."""
    model, idx = tiny('mha', T=65)
    model.block_size = 64
    z = (torch.arange(65) // 20).clamp(max=1).expand(3, 65)
    idx, z = torch.cat([idx, idx]), torch.cat([z, z])[:6]
    score, entropy = np.arange(12.).reshape(3, 4), np.ones((3, 4))
    a = ablation(model, idx, z, score, entropy, 2, 0)
    assert a['none']['loss'] == pytest.approx(model(idx[3:, :-1], idx[3:, 1:]).mean().item(), abs=1e-5)
    assert a['k'] == [1, 2] and len({round(x['loss'], 6) for x in a['topical']}) == 2
    near = model(idx[3:, :-1], idx[3:, 1:])[:, 19:23].mean().item()          # tokens 20-23, predicted at 19-22
    assert a['none']['near'] == pytest.approx(near, abs=1e-5)
    other = idx.clone()
    other[:3] = other[:3].flip(1)                           # other means: other losses, the whole model's stay
    b = ablation(model, other, z, score, entropy, 2, 0)
    assert b['none'] == a['none'] and b['topical'] != a['topical']

def test_run_1_has_27_4_million_parameters():
    with torch.device('meta'):
        model = Qwen3(4096, 512, n_layer=8, n_head=8, n_kv_head=8, n_embd=512, head_dim=64, mlp_hidden=1376)
    assert sum(p.numel() for p in model.parameters()) == 27_403_776

def test_muon_is_torch_muon():
    """Stacked matrices, five steps, tall, wide and square, with decay and a changing rate: the weights to fp32
    rounding of the rate (the orthogonalised updates are the same to the bit)."""
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
        muon.step(torch.tensor(1 / (step + 1)), torch.ones(()))
        reference.step()
    for group, momentum in zip(muon.groups, muon.momentum):
        for p, mine in zip(group, momentum):
            q = theirs[next(i for i, o in enumerate(ours) if o is p)]
            assert torch.equal(mine, reference.state[q]['momentum_buffer'])
            assert (p - q).abs().max() < 2e-6
