"""
Mini-Qwen3: the Qwen3 architecture small enough to train in minutes, with a switch that drops RoPE.

Pre-norm transformer; RMSNorm on every query and key head (QK-Norm) before rotary positions; SwiGLU; grouped-query
attention; no biases; tied embedding. Parameter names are those of Hugging Face's Qwen3ForCausalLM, so a state dict
is an export (sources: Qwen3 technical report, arXiv 2505.09388; DroPE, arXiv 2512.12167, for the switch).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from runs import read_config

# -----------------------------------------------------------------------------
# pieces

def fp32(x):
    """x in fp32; in fp64 where it is that already, for the tests that ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)               # Qwen3 has no biases

class RMSNorm(nn.Module):
    eps = 1e-6

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        """x / rms(x) * weight over the last dimension; in fp32, cast back, then scaled (Qwen3's order)."""
        h = fp32(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * h.to(x.dtype)

def rotary(block_size, head_dim, theta):
    """(cos, sin) of RoPE's angles [block_size, head_dim], fp32, angle(t, i) = t * theta^(-2i / head_dim); the first
    half of sin is negated, as `rotate` needs it."""
    inv_freq = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)         # [head_dim / 2], rounded as in HF
    angle = torch.outer(torch.arange(block_size).float(), inv_freq)           # [block_size, head_dim / 2]
    return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], -1)

def rotate(x, cos, sin):
    """Half-rotation RoPE: the pair (x_i, x_{i + head_dim/2}) turns by angle(t, i). x: [B, heads, T, head_dim]."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).to(x.dtype)          # a cat here would compile to slow code

def causal_bias(T, device=None):
    """Plain causal attention as a bias on the scores [T, T]: 0 for keys up to the query, -inf for later ones."""
    return torch.full((T, T), float('-inf'), device=device).triu(1)

class Attention(nn.Module):
    """Positions enter here: rope (cos, sin) or None, bias [T, T], [n_head, T, T] or None; see Qwen3.positions."""
    def __init__(self, n_embd, n_head, n_kv_head, head_dim):
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = head_dim
        self.q_proj = linear(n_embd, n_head * head_dim)
        self.k_proj = linear(n_embd, n_kv_head * head_dim)
        self.v_proj = linear(n_embd, n_kv_head * head_dim)
        self.o_proj = linear(n_head * head_dim, n_embd)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def qkv(self, x, rope):
        """Queries [B, n_head, T, head_dim], keys and values [B, n_kv_head, T, head_dim]."""
        heads = (*x.shape[:2], -1, self.head_dim)                             # [B, T, heads, head_dim]
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if rope is not None:                                                  # the one switch: DroPE is rope=None
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def out(self, y):
        """What the heads found, y [B, n_head, T, head_dim], written to the residual stream [B, T, n_embd]."""
        return self.o_proj(y.transpose(1, 2).flatten(2))                      # of [B, T, n_head * head_dim]

    def forward(self, x, rope, bias):
        q, k, v = self.qkv(x, rope)
        return self.out(F.scaled_dot_product_attention(
            q, k, v, bias, is_causal=bias is None, enable_gqa=self.n_kv_head != self.n_head))

    def explicit(self, x, rope, bias):
        """The same attention written out: (output [B, T, n_embd], pattern [B, n_head, T, T] in fp32)."""
        q, k, v = self.qkv(x, rope)
        group = self.n_head // self.n_kv_head                                 # head h reads kv head h // group
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = fp32(q) @ fp32(k).transpose(-1, -2) * self.head_dim ** -0.5
        if bias is None:
            bias = causal_bias(x.size(1), x.device)
        pattern = (scores + bias).softmax(-1)
        return self.out((pattern @ fp32(v)).to(v.dtype)), pattern

class MLP(nn.Module):
    def __init__(self, n_embd, mlp_hidden):
        super().__init__()
        self.gate_proj = linear(n_embd, mlp_hidden)
        self.up_proj = linear(n_embd, mlp_hidden)
        self.down_proj = linear(mlp_hidden, n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, n_embd, n_head, n_kv_head, head_dim, mlp_hidden):
        super().__init__()
        self.input_layernorm = RMSNorm(n_embd)
        self.self_attn = Attention(n_embd, n_head, n_kv_head, head_dim)
        self.post_attention_layernorm = RMSNorm(n_embd)
        self.mlp = MLP(n_embd, mlp_hidden)

    def forward(self, x, rope, bias):
        x = x + self.self_attn(self.input_layernorm(x), rope, bias)
        return x + self.mlp(self.post_attention_layernorm(x))

# -----------------------------------------------------------------------------
# the model

class Qwen3(nn.Module):
    """
    vocab_size, block_size: tokens. n_head query heads share n_kv_head key-value heads (equal: MHA; fewer: GQA).
    rope: whether positions are rotated in; may be switched on a trained model, which is all that DroPE does to it.
    seed: of the weights, which are drawn on the CPU (normal, sd 0.02; norm gains 1).
    others: what else a run's config holds, passed over.
    """
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, head_dim, mlp_hidden,
                 rope=True, rope_theta=1e6, seed=0, **others):
        super().__init__()
        if n_head % n_kv_head:
            raise SystemExit(f'model: n_head = {n_head} is not divisible by n_kv_head = {n_kv_head}')
        if head_dim % 2:
            raise SystemExit(f'model: head_dim = {head_dim} is odd; RoPE turns pairs')
        self.block_size = block_size
        self.rope = rope
        self.model = nn.ModuleDict({                        # the names of Hugging Face's Qwen3
            'embed_tokens': nn.Embedding(vocab_size, n_embd),
            'layers': nn.ModuleList(Block(n_embd, n_head, n_kv_head, head_dim, mlp_hidden) for _ in range(n_layer)),
            'norm': RMSNorm(n_embd)})
        for name, table in zip(('cos', 'sin'), rotary(block_size, head_dim, rope_theta)):
            self.register_buffer(name, table, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)

    def positions(self, layer, T):
        """
        Where positions enter attention in a layer, for T tokens: (rope, bias). Training, the written-out patterns, the
        chance levels and the export all read this, so another kind of position is a change here and nowhere else.

        rope: (cos, sin), each [T, head_dim], or None. bias: None is plain causal attention; else added to the scores,
        [T, T] or [n_head, T, T], -inf where a key is not allowed, and so for all later keys (`causal_bias`).
        """
        if T > self.block_size:
            raise ValueError(f'{T} tokens, but block_size is {self.block_size}')
        rope = (self.cos[:T], self.sin[:T]) if self.rope else None
        return rope, None

    def allowed(self, layer, T):
        """The keys that each query of a layer may look at, in some head: bool [T, T]."""
        _, bias = self.positions(layer, T)
        if bias is None:
            bias = causal_bias(T, self.cos.device)
        return (bias > float('-inf')).view(-1, T, T).any(0)

    def stock_positions(self):
        """Whether stock Qwen3 has these positions: plain causal, and this RoPE in all layers or in none."""
        for layer in range(len(self.model.layers)):
            rope, bias = self.positions(layer, self.block_size)
            if bias is not None or (rope is not None) != self.rope:
                return False
            if rope and not torch.equal(rope[0], self.cos):
                return False
        return True

    def embed(self, idx):
        """The residual stream as it begins [B, T, n_embd]; bf16 under autocast: half the traffic."""
        x = self.model.embed_tokens(idx)
        return x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x

    def head(self, x):
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)   # tied: no lm_head

    def losses(self, x, targets):
        """Each token's cross-entropy [B, T] in nats, of the last block's x [B, T, n_embd]."""
        logits = self.head(x).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction='none').view_as(targets)

    def forward(self, idx, targets=None, embed=embed, call_block=nn.Module.__call__, losses=losses):
        """Logits [B, T, vocab_size] of idx [B, T]; with targets [B, T] their `losses`. The last three arguments:
        how its parts are computed, for train.compiled."""
        x = embed(self, idx)
        for layer, block in enumerate(self.model.layers):
            x = call_block(block, x, *self.positions(layer, idx.size(1)))
        return self.head(x) if targets is None else losses(self, x, targets)

    @torch.no_grad()
    def trace(self, idx, causal=True):
        """Layer by layer, for analysis: yields (hidden state [B, T, n_embd], pattern [B, n_head, T, T]), first the
        embedding with pattern None. causal=False takes the mask away, and any other bias: what the log's own analysis
        did, for comparison."""
        T = idx.size(1)
        x = self.model.embed_tokens(idx)
        yield x, None
        for layer, block in enumerate(self.model.layers):
            rope, bias = self.positions(layer, T)
            if not causal:
                bias = torch.zeros(T, T, device=idx.device)
            y, pattern = block.self_attn.explicit(block.input_layernorm(x), rope, bias)
            x = x + y
            x = x + block.mlp(block.post_attention_layernorm(x))
            yield x, pattern

# -----------------------------------------------------------------------------
# checkpoints

def build(config):
    """The model that a run's config.json (a dict) describes, freshly initialised."""
    return Qwen3(**config)

def read_checkpoint(folder, device='cpu'):
    """ckpt.pt of a run folder: {'model', 'optimizer', 'step', ...}. weights_only: a checkpoint can't run code."""
    path = f'{folder}/ckpt.pt'
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f'{path}: no checkpoint; the run was not trained, or its checkpoint was deleted')
    except Exception as e:                                  # a damaged file can fail in any way
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); delete it and train again')
    if not {'model', 'optimizer', 'step'} <= set(ckpt):
        raise SystemExit(f'{path}: a checkpoint, but not one of ours (no model, optimizer and step in it)')
    return ckpt

def load_weights(model, weights, folder):
    """Put the weights of a run into a model, or say that they belong to another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        line = str(e).splitlines()[-1].strip()
        raise SystemExit(f'{folder}/ckpt.pt: weights of another model than config.json describes: {line}')

def load(folder, device='cpu'):
    """The trained model of a run folder, ready for a notebook: `load('out/demo/mha_shuffled_rope/seed0')`. Stops with
    one line where the run is not finished."""
    config = read_config(folder)
    ckpt = read_checkpoint(folder)
    if ckpt['step'] < config['max_iters']:
        raise SystemExit(f'{folder}: stopped at step {ckpt["step"]} of {config["max_iters"]}; finish it first')
    model = build(config)
    load_weights(model, ckpt['model'], folder)
    return model.to(device).eval()
