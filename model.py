"""
Mini-Qwen3: the Qwen3 architecture small enough to train in minutes, with a switch that drops RoPE.

Pre-norm transformer; RMSNorm on every query and key head (QK-Norm) before rotary positions; SwiGLU; grouped-query
attention; no biases; tied embedding. Parameter names are those of Hugging Face's Qwen3ForCausalLM, so a state dict
is an export (sources: Qwen3 technical report, arXiv 2505.09388; DroPE, arXiv 2512.12167, for the switch).
"""
import json
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# pieces

def fp32(x):
    """x in fp32; in fp64 where it is that already, for the tests that ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        """x / rms(x) * weight over the last dimension; in fp32, cast back, then scaled (Qwen3's order)."""
        h = fp32(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)

def rotary(block_size, head_dim, theta):
    """(cos, sin) of RoPE's angles [block_size, head_dim], fp32, angle(t, i) = t * theta^(-2i / head_dim); the first
    half of sin is negated, as `rotate` needs it."""
    inv_freq = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)         # [head_dim / 2], rounded as in HF
    angle = torch.arange(block_size).float()[:, None] * inv_freq             # [block_size, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

def rotate(x, cos, sin):
    """Half-rotation RoPE: the pair (x_i, x_{i + head_dim/2}) turns by angle(t, i). x: [B, heads, T, head_dim]."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).to(x.dtype)          # a cat here would compile to slow code

class Products(torch.autograd.Function):
    """F.linear(x, W) for several W, forward as one product that reads x once. Backward they stay apart: the gradients
    come from different places, and copying them together costs more than it saves. x: [B, T, n_embd]."""
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights)).split([len(w) for w in weights], dim=-1)

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        dx = sum(g @ w for g, w in zip(grads, weights))
        return dx, *(g.flatten(0, -2).mT @ x.flatten(0, -2) for g in grads)

def linears(x, *layers):
    """[layer(x) for layer in layers], linear ones without bias."""
    return Products.apply(x, *(layer.weight.to(x.dtype) for layer in layers))

class Attention(nn.Module):
    def __init__(self, n_embd, n_head, n_kv_head, head_dim):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.q_proj = nn.Linear(n_embd, n_head * head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, n_kv_head * head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, n_kv_head * head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * head_dim, n_embd, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def qkv(self, x, rope):
        """Queries [B, n_head, T, head_dim], keys and values [B, n_kv_head, T, head_dim]. rope: (cos, sin) or None."""
        B, T, _ = x.shape
        q, k, v = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(q.view(B, T, self.n_head, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(B, T, self.n_kv_head, self.head_dim)).transpose(1, 2)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if rope is not None:                                                  # the one switch: DroPE is rope=None
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v.to(q.dtype)

    def out(self, y):
        B, _, T, _ = y.shape                                                  # [B, n_head, T, head_dim]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))

    def forward(self, x, rope):
        q, k, v = self.qkv(x, rope)
        gqa = self.n_kv_head != self.n_head
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa))

    def explicit(self, x, rope, causal=True):
        """The same attention written out: (output [B, T, n_embd], pattern [B, n_head, T, T] in fp32)."""
        q, k, v = self.qkv(x, rope)
        group = self.n_head // self.n_kv_head                                 # head h reads kv head h // group
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = fp32(q) @ fp32(k).transpose(-1, -2) * self.head_dim ** -0.5
        if causal:
            T = x.size(1)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float('-inf'))
        pattern = scores.softmax(-1)
        return self.out((pattern @ fp32(v)).to(v.dtype)), pattern

class MLP(nn.Module):
    def __init__(self, n_embd, mlp_hidden):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, mlp_hidden, bias=False)
        self.up_proj = nn.Linear(n_embd, mlp_hidden, bias=False)
        self.down_proj = nn.Linear(mlp_hidden, n_embd, bias=False)

    def forward(self, x):
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)

class Block(nn.Module):
    def __init__(self, n_embd, n_head, n_kv_head, head_dim, mlp_hidden):
        super().__init__()
        self.input_layernorm = RMSNorm(n_embd)
        self.self_attn = Attention(n_embd, n_head, n_kv_head, head_dim)
        self.post_attention_layernorm = RMSNorm(n_embd)
        self.mlp = MLP(n_embd, mlp_hidden)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))

    def explicit(self, x, rope, causal=True):
        y, pattern = self.self_attn.explicit(self.input_layernorm(x), rope, causal)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), pattern

# -----------------------------------------------------------------------------
# the model

class Decoder(nn.Module):
    """Holds the weights under Hugging Face's names: model.embed_tokens, model.layers.0..., model.norm."""
    def __init__(self, vocab_size, n_layer, n_embd, *sizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, n_embd)
        self.layers = nn.ModuleList(Block(n_embd, *sizes) for _ in range(n_layer))
        self.norm = RMSNorm(n_embd)

class Qwen3(nn.Module):
    """
    vocab_size, block_size: tokens. n_head query heads share n_kv_head key-value heads (equal: MHA; fewer: GQA).
    rope: whether positions are rotated in; may be switched on a trained model, which is all that DroPE does to it.
    generator: a CPU torch.Generator from which the weights are drawn (normal, sd 0.02; norm gains 1).
    """
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, head_dim, mlp_hidden,
                 rope=True, rope_theta=1e6, generator=None):
        super().__init__()
        if n_head % n_kv_head:
            raise SystemExit(f'model: n_head = {n_head} is not divisible by n_kv_head = {n_kv_head}')
        if head_dim % 2:
            raise SystemExit(f'model: head_dim = {head_dim} is odd; RoPE turns pairs')
        self.block_size, self.rope = block_size, rope
        self.model = Decoder(vocab_size, n_layer, n_embd, n_head, n_kv_head, head_dim, mlp_hidden)
        cos, sin = rotary(block_size, head_dim, rope_theta)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)

    def positions(self, T):
        if T > self.block_size:
            raise ValueError(f'{T} tokens, but block_size is {self.block_size}')
        return (self.cos[:T], self.sin[:T]) if self.rope else None

    def head(self, x):
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)   # tied: no lm_head

    def forward(self, idx, targets=None):
        """Logits [B, T, vocab_size] of idx [B, T]; with targets [B, T] each token's cross-entropy [B, T] in nats."""
        rope = self.positions(idx.size(1))
        x = self.model.embed_tokens(idx)                                      # [B, T, n_embd]
        if torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()                                                  # the residual stream: half the traffic
        for block in self.model.layers:
            x = block(x, rope)
        logits = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction='none').view_as(targets)

    @torch.no_grad()
    def trace(self, idx, causal=True):
        """Layer by layer, for analysis: yields (hidden state [B, T, n_embd], pattern [B, n_head, T, T]), first the
        embedding with pattern None. causal=False removes the mask: what the log's own analysis did, for comparison."""
        rope = self.positions(idx.size(1))
        x = self.model.embed_tokens(idx)
        yield x, None
        for block in self.model.layers:
            x, pattern = block.explicit(x, rope, causal)
            yield x, pattern

# -----------------------------------------------------------------------------
# checkpoints

SHAPE = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'mlp_hidden', 'vocab_size', 'block_size', 'rope_theta')

def build(config, generator=None):
    """The model that a run's config.json (a dict) describes, freshly initialised."""
    return Qwen3(**{k: config[k] for k in SHAPE}, rope=config['rope'], generator=generator)

RUN_KEYS = ('rope', 'recal_steps', 'data_dir', 'seed', 'n_topics', 'condition', 'max_iters')   # all runs have these

def read_config(folder):
    """config.json of a run folder as a dict."""
    try:
        config = json.load(open(os.path.join(folder, 'config.json')))
    except OSError:
        raise SystemExit(f'{folder}: no run here (config.json is missing); train.py makes one') from None
    except ValueError:
        raise SystemExit(f'{folder}/config.json: not JSON; delete the folder and train again') from None
    if not isinstance(config, dict) or not {*SHAPE, *RUN_KEYS} <= config.keys():
        raise SystemExit(f'{folder}/config.json: not of one of our runs; train.py makes one')
    return config

def read_checkpoint(folder, device='cpu'):
    """ckpt.pt of a run folder: {'model', 'optimizer', 'step', ...}. weights_only: a checkpoint can't run code."""
    path = os.path.join(folder, 'ckpt.pt')
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f'{path}: no checkpoint; the run was not trained, or its checkpoint was deleted') from None
    except Exception as e:                                  # a damaged file can fail in any way
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); delete it and train again') from None
    if not isinstance(ckpt, dict) or not {'model', 'optimizer', 'step'} <= ckpt.keys():
        raise SystemExit(f'{path}: a checkpoint, but not one of ours (no model, optimizer and step in it)')
    return ckpt

def read_finished(folder, config, device='cpu'):
    """The checkpoint of a run that has made all the steps of its config."""
    ckpt = read_checkpoint(folder, device)
    if ckpt['step'] < config['max_iters']:
        raise SystemExit(f'{folder}: stopped at step {ckpt["step"]} of {config["max_iters"]}; finish it first')
    return ckpt

def load_weights(model, ckpt, folder):
    """Put a checkpoint's weights into a model, or say that they belong to another one."""
    try:
        model.load_state_dict(ckpt['model'])
    except RuntimeError as e:
        line = str(e).split('\n')[1].strip() if '\n' in str(e) else str(e)
        raise SystemExit(f'{folder}/ckpt.pt: weights of another model than config.json describes: {line}') from None
    return model

def load(folder, device='cpu'):
    """The trained model of a run folder, ready for a notebook: `load('out/demo/mha_shuffled_rope/seed0')`."""
    model = build(read_config(folder))
    return load_weights(model, read_checkpoint(folder), folder).to(device).eval()
