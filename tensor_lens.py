"""
The whole model as one linear operator: which topic's tokens made a hidden state, a logit. For analyze.py, which puts
the shares of the own topic into the row of a run.

Freeze at their forward values every 1/rms of a norm, every attention pattern and the gate silu(g) of each SwiGLU. What
is left is linear: at every depth h_i = sum_j T_ij x_j in the token embeddings x_j, exactly. T is never built: a pass
with the embeddings of one topic alone gives that topic's part of every state, and the parts add up to the whole.
(Sources: TensorLens, arXiv 2601.17958; Equivalent Linear Mappings, arXiv 2505.24293. The split by topic is ours.)

The share of the position's own topic is taken over positions with a choice (some other topic came before), beside its
chance level: the same labels, handed round between rows with as many runs. What fools it: a token is of its own topic,
so `others` leaves out the position's own token, again exactly; tokens that tell the topic (`range` chain) resemble each
other, so their embeddings project on each other through any attention; attention that stops at boundaries raises it
without knowing a topic. And freezing is no intervention: T says what was added up, not what another token would do.
"""
import torch
import torch.nn.functional as F

import measures

# -----------------------------------------------------------------------------
# the frozen model, on parts [B, T, P, n_embd] of the embeddings, as many as there are

def norm_scale(norm, x):
    """What an RMSNorm multiplies x [..., n_embd] by, entry by entry."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return norm.weight * torch.rsqrt(mean_square + norm.eps)

def layer_map(block, pattern, scale1, scale2, gate, parts):
    """What a layer makes of parts [B, T, P, n_embd], its pattern, the scales of its norms and its gate frozen."""
    attn = block.self_attn
    v = attn.v_proj(scale1[:, :, None] * parts)
    v = v.unflatten(3, (-1, attn.head_dim))                 # [B, T, P, g, head_dim]
    pattern = pattern.unflatten(1, (attn.n_kv_head, -1))    # query head h reads kv head h // group: [B, g, q, T, T]
    heads = torch.einsum('bgqts,bspgd->btpgqd', pattern, v)
    parts = parts + attn.o_proj(heads.flatten(3))
    up = block.mlp.up_proj(scale2[:, :, None] * parts)
    gated = gate[:, :, None] * up
    return parts + block.mlp.down_proj(gated)

def carried(model, idx, parts):
    """
    Depth by depth on rows idx [B, T]: hidden [B, T, n_embd]; what the frozen model makes of parts [B, T, P, n_embd];
    and own [B, T, 1, n_embd], what it makes of the position's own embedding, T_ii x_i. First the embedding, then after
    every layer, last the final norm; logits are W_E times that.
    """
    x = model.model.embed_tokens(idx)
    own = x[:, :, None]
    yield x, parts, own
    for layer, block in enumerate(model.model.layers):
        scale1 = norm_scale(block.input_layernorm, x)
        rope, bias = model.positions(layer, x.size(1))
        y, pattern = block.self_attn.explicit(scale1 * x, rope, bias)
        x = x + y
        scale2 = norm_scale(block.post_attention_layernorm, x)
        gate = F.silu(block.mlp.gate_proj(scale2 * x))      # [B, T, mlp_hidden]
        x = x + block.mlp(scale2 * x)
        parts = layer_map(block, pattern, scale1, scale2, gate, parts)
        # T is causal, so its diagonal blocks are the products of the layers' diagonal blocks
        own = layer_map(block, pattern.triu(), scale1, scale2, gate, own)
        yield x, parts, own
    last = norm_scale(model.model.norm, x)
    scale = last[:, :, None]
    yield last * x, scale * parts, scale * own

@torch.no_grad()
def topic_parts(model, idx, labels, n_topics):
    """
    Depth by depth: (hidden [B, T, n_embd], parts [B, T, M, n_topics, n_embd] whose sum over topics is hidden, for each
    of M labellings [B, T, M] of the tokens idx [B, T], and own [B, T, n_embd], what each position has of itself).
    """
    x = model.model.embed_tokens(idx)
    masks = F.one_hot(labels, n_topics).flatten(2)          # [B, T, M * n_topics]
    parts = masks[..., None] * x[:, :, None]
    for hidden, parts, own in carried(model, idx, parts):
        by_topic = parts.unflatten(2, (-1, n_topics))
        yield hidden, by_topic, own[:, :, 0]

# -----------------------------------------------------------------------------
# the share of a position's own topic

def share_sums(parts, against, counts):
    """
    Sums over the positions that count [T, M], fp64 [3, M], of projections on `against` [T, n_embd] of three parts: the
    whole state [T, 1, n_embd], what its topic made of it [T, M, n_embd], what its token did [T, 1, n_embd].
    hidden / |hidden|^2 makes these shares of the state, a row of the readout parts of a logit.
    """
    sums = []
    for part in parts:
        projection = torch.einsum('tmn,tn->tm', part, against)
        sums.append((projection.double() * counts).sum(0))
    return torch.stack(sums)

def row_sums(model, tokens, labels, n_topics):
    """share_sums of one row at each depth of `carried`, and last of the logit of its next tokens: [n_layer + 3, 3, M].
    tokens [T + 1], labels [T, M]."""
    other = labels != labels[0]
    counts = other.cumsum(0) > 0                            # a choice: some other topic before
    sums = []
    depths = topic_parts(model, tokens[None, :-1], labels[None], n_topics)
    for hidden, parts, own in depths:
        hidden = hidden[0]
        mine = parts[0].take_along_dim(labels[..., None, None], 2).squeeze(2)
        three = hidden[:, None], mine, own[0, :, None]
        against = hidden / hidden.pow(2).sum(1, keepdim=True)
        sums.append(share_sums(three, against, counts))
    W = model.model.embed_tokens.weight
    against = (W - W.mean(0))[tokens[1:]]                   # the mean over the vocabulary is nothing to softmax
    sums.append(share_sums(three, against, counts))
    return torch.stack(sums)

def with_chance(part, whole, least):
    """{'value', 'chance', 'chance_sd'}, over depths, of part / whole [depths, 1 + draws], the true labels first; nan
    where there is too little to share."""
    share = torch.where(whole > least, part / whole, torch.nan)
    draws = share[:, 1:]
    return {
        'value': share[:, 0],
        'chance': draws.mean(1),
        'chance_sd': draws.std(1)}

@torch.no_grad()
def own_topic_shares(model, tokens, topics, n_topics, draws, seed):
    """
    What the tokens of a position's own topic make of its states, and of the logit of the next token: the `lens` of a
    row. tokens [n, T + 1] and topics [n, T] on the model's device. draws: label exchanges behind the chance level.
    Returns {'projection', 'projection_others'}, each with 'value', 'chance', 'chance_sd' by depth: of the embedding,
    after every layer, of the final norm, of the logit.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, exchanged = measures.exchanged(topics, draws, generator)
    labels = torch.cat([topics[None], labels])              # [1 + draws, n, T]
    depths = len(model.model.layers) + 3
    sums = torch.zeros(depths, 3, 1 + draws).double()
    for row in exchanged.nonzero()[:, 0]:                   # one at a time: its parts are many
        found = row_sums(model, tokens[row], labels[:, row].T, n_topics)
        sums += found.cpu()
    whole, topic, token = sums.unbind(1)
    least = 0.01 * whole[0]                                 # whole[0]: the positions that count
    return {
        'projection': with_chance(topic, whole, least),
        'projection_others': with_chance(topic - token, whole - token, least)}
