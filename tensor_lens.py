"""
The whole model as one linear operator: which topic's tokens made a hidden state, a logit; into lens.json of a run.

    python tensor_lens.py --run=out/demo/mha_shuffled_rope/seed0

Freeze at their forward values every 1/rms of a norm, every attention pattern and one factor of each SwiGLU. What is
left is linear: at every depth h_i = sum_j T_ij x_j in the token embeddings x_j, exactly. T is never built: a pass with
the embeddings of one topic alone gives that topic's part of every state, and the parts add up to the whole.
(Sources: TensorLens, arXiv 2601.17958; Equivalent Linear Mappings, arXiv 2505.24293. The split by topic is ours.)

Within: the part of the position's own topic, over positions with a choice (some other topic came before), beside its
chance level: the same labels, handed round between rows with as many runs. What fools it: a token is of its own topic,
so `others` leaves out the position's own token, again exactly; tokens that tell the topic (`range` chain) resemble each
other, so their embeddings project on each other through any attention; attention that stops at boundaries raises it
without knowing a topic. And freezing is no intervention: T says what was added up, not what another token would do.
"""
import functools
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import measures
import shards
from analyze import open_finished, show, tidy
from configurator import at_least, configure
from train import memory_errors, progress, versions

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run
lens_rows = 200             # validation rows, the first ones
lens_draws = 5              # label exchanges behind the chance level
lens_gate = 'silu'          # which freezing is told of first: 'silu' of the gate, or 'up' (with the gate's sigmoid)
lens_row: int = None        # row of the token strip; none: the first with most runs
lens_position = -1          # position in it whose next-token logit is taken apart; -1: the last
device = ''                 # as in train.py

# -----------------------------------------------------------------------------

SETTINGS = ('lens_rows', 'lens_draws', 'lens_gate', 'lens_row', 'lens_position')           # kept in lens.json
GATES = ('silu', 'up')      # SwiGLU = silu(g) * up = g * (sigmoid(g) * up): freeze the first factor, or the second
WITHIN = ('projection', 'projection_others', 'norm', 'norm_others')

# -----------------------------------------------------------------------------
# the frozen model

def scale(norm, x):
    """What an RMSNorm multiplies x [..., n_embd] by, entry by entry."""
    return norm.weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)

def layer_map(block, pattern, scale1, scale2, project, factor, parts, own=False):
    """One frozen layer on parts [B, T, P, n_embd], as many as there are. own: attention to the position itself alone;
    as T is causal its diagonal blocks are the products of the layers' diagonal blocks, so this gives T_ii x_i."""
    attn, (B, T, P, _) = block.self_attn, parts.shape
    v = attn.v_proj(scale1[:, :, None] * parts).view(B, T, P, attn.n_kv_head, attn.head_dim)
    pattern = pattern.view(B, attn.n_kv_head, -1, T, T)     # query head h reads kv head h // group: [B, g, q, T, T]
    if own:
        y = torch.einsum('bgqtt,btpgd->btpgqd', pattern, v)
    else:
        y = torch.einsum('bgqts,bspgd->btpgqd', pattern, v)
    parts = parts + attn.o_proj(y.reshape(B, T, P, -1))
    return parts + block.mlp.down_proj(factor[:, :, None] * project(scale2[:, :, None] * parts))

@torch.no_grad()
def frozen(model, idx, gate='silu'):
    """
    Depth by depth on rows idx [B, T]: (hidden [B, T, n_embd], the linear map that brings parts [B, T, P, n_embd] there
    from the depth before). First the embedding, then after every layer, last the final norm; logits are W_E times that.
    """
    rope = model.positions(idx.size(1))
    x = model.model.embed_tokens(idx)
    yield x, lambda parts, own=False: parts
    for block in model.model.layers:
        mlp, scale1 = block.mlp, scale(block.input_layernorm, x)
        y, pattern = block.self_attn.explicit(scale1 * x, rope)
        x = x + y
        scale2 = scale(block.post_attention_layernorm, x)
        g, up = mlp.gate_proj(scale2 * x), mlp.up_proj(scale2 * x)             # [B, T, mlp_hidden]
        project, factor = (mlp.up_proj, F.silu(g)) if gate == 'silu' else (mlp.gate_proj, g.sigmoid() * up)
        x = x + mlp.down_proj(F.silu(g) * up)
        yield x, functools.partial(layer_map, block, pattern, scale1, scale2, project, factor)
    last = scale(model.model.norm, x)
    yield last * x, lambda parts, own=False: last[:, :, None] * parts

def topic_parts(model, idx, labels, n_topics, gate='silu'):
    """
    Depth by depth: (hidden [B, T, n_embd], parts [B, T, M, n_topics, n_embd] whose sum over topics is hidden, for each
    of M labellings [B, T, M] of the tokens idx [B, T], and own [B, T, n_embd], what each position has of itself).
    """
    for depth, (hidden, linear) in enumerate(frozen(model, idx, gate)):
        if depth == 0:
            parts = (F.one_hot(labels, n_topics).to(hidden)[..., None] * hidden[:, :, None, None]).flatten(2, 3)
            own = hidden[:, :, None]                                           # [B, T, 1, n_embd]
        parts, own = linear(parts), linear(own, own=True)
        yield hidden, parts.unflatten(2, (-1, n_topics)), own[:, :, 0]

def operator(model, idx, gate='silu'):
    """T itself, for tiny models: [T, n_embd, T, n_embd] (state, its entry, token, its entry) of one row idx [T], at
    each depth of `frozen`."""
    n, found = model.model.embed_tokens.weight.size(1), []
    parts = torch.eye(len(idx) * n).to(model.model.norm.weight).view(1, len(idx), n, len(idx) * n).mT
    for _, linear in frozen(model, idx[None], gate):
        parts = linear(parts)                                                  # [1, T, T * n_embd, n_embd]
        found.append(parts[0].mT.unflatten(-1, (len(idx), n)))
    return found

def readout(model):
    """Rows that read logits off the final norm, less their mean over the vocabulary, which softmax does not see."""
    W = model.model.embed_tokens.weight.detach()
    return W - W.mean(0)

def token_contributions(model, idx, position, target, gate='silu'):
    """What each token of a row idx [T] adds, signed, to the logit of `target` at a position (above the mean over the
    vocabulary): [T], by one backward pass. Their sum is the logit."""
    start = model.model.embed_tokens(idx[None])[:, :, None].detach().requires_grad_()
    with torch.enable_grad():
        parts = start
        for _, linear in frozen(model, idx[None], gate):
            parts = linear(parts)
        logit = parts[0, position, 0] @ readout(model)[target]
    gradient, = torch.autograd.grad(logit, start)
    return (gradient * start.detach())[0, :, 0].sum(-1)

# -----------------------------------------------------------------------------
# within-topic contributions

def within_sums(hidden, parts, own, against, labels, count):
    """
    Sums over positions, [9, M] in fp64. A part p counts as <p, against>, against [B, T, n_embd]: hidden / |hidden|^2
    makes that the share of the state, a row of the readout the part of a logit. count [B, T, M]: positions that do.
    """
    mine = parts.take_along_dim(labels[..., None, None], 3)[:, :, :, 0]        # [B, T, M, n_embd] of the own topic
    dot = lambda x: torch.einsum('btmn,btn->btm', x, against)
    whole, self_ = (dot(x[:, :, None]) for x in (hidden, own))                 # [B, T, 1]
    mine_dot, norms, mine_norm = dot(mine), parts.norm(dim=-1).sum(-1), mine.norm(dim=-1)
    rest_norm = (mine - own[:, :, None]).norm(dim=-1)
    rest_norms = norms - mine_norm + rest_norm
    has = rest_norms > 1e-5 * norms                                            # else nothing but the token itself
    total = lambda x: (x.double() * count).sum((0, 1)) + torch.zeros_like(count[0, 0], dtype=torch.double)
    return torch.stack([total(x) for x in (
        torch.ones_like(whole), whole, mine_dot, self_, whole - self_, mine_dot - self_,
        mine_norm / norms.clamp(min=1e-30), has.to(norms), torch.where(has, rest_norm / rest_norms, 0.))])

def within_shares(sums, others_least=0.01):
    """Shares from the sums of within_sums [..., 9, M]: name -> [..., M], nan where there is nothing to share."""
    n, whole, mine, _, rest, mine_rest, norm, has, rest_norm = sums.unbind(-2)
    over = lambda a, b, least: torch.where(b > least * n, a / b, torch.nan)
    return {'projection': over(mine, whole, others_least), 'projection_others': over(mine_rest, rest, others_least),
            'norm': over(norm, n, 0), 'norm_others': over(rest_norm, has, 0)}

@torch.no_grad()
def contributions(model, tokens, labels, rows, n_topics, gate, size):
    """
    Sums over rows: of within_sums [L + 3, 9, M], and of the share of each topic in states at positions of each topic
    [L + 2, n_topics, n_topics], with the positions by topic [n_topics]. Depths as in `frozen`; the last of L + 3 is the
    correct next token's logit. tokens [n, T + 1], labels [M, n, T], the first of them the true ones; rows [n]: those
    that count; size: rows at a time.
    """
    within = by_topic = positions = 0
    for b in progress(torch.arange(len(tokens)).split(size), desc=f'lens, {gate} frozen', unit='batch', leave=False):
        x, y, z = tokens[b, :-1], tokens[b, 1:], labels[:, b].permute(1, 2, 0)             # z [B, T, M]
        seen = measures.same_keys(z.permute(0, 2, 1).flatten(0, 1)).unflatten(0, (len(b), -1)).mT
        t = torch.arange(1, x.size(1) + 1, device=x.device)
        count = (seen < t[:, None]) & rows[b, None, None]                      # a choice: some other topic before
        true = F.one_hot(z[..., 0], n_topics) * count[..., :1]                 # [B, T, K]
        sums, tables = [], []
        for hidden, parts, own in topic_parts(model, x, z, n_topics, gate):
            against = hidden / hidden.pow(2).sum(-1, keepdim=True)
            sums.append(within_sums(hidden, parts, own, against, z, count))
            share = torch.einsum('btkn,btn->btk', parts[:, :, 0], against)
            tables.append(torch.einsum('btz,btk->zk', true.double(), share.double()))
        sums.append(within_sums(hidden, parts, own, readout(model)[y], z, count))
        within, by_topic = within + torch.stack(sums), by_topic + torch.stack(tables)
        positions = positions + true.sum((0, 1))
    return within, by_topic, positions

def rows_at_a_time(c, passes, device):
    """Rows whose parts, a few copies of each, and patterns fit in memory: about 4 GiB on a GPU."""
    T, heads = c['block_size'], c['n_head'] * c['head_dim']
    row = 4 * T * (passes * (4 * c['n_embd'] + 2 * heads + 2 * c['mlp_hidden']) + 4 * c['n_head'] * T)
    return max(1, (4 << 30 if device.type == 'cuda' else 256 << 20) // row)

# -----------------------------------------------------------------------------

def check(cfg):
    """Stops with one line at the first setting that can't work."""
    at_least(cfg, lens_rows=2, lens_draws=1)
    if cfg.lens_gate not in GATES:
        raise SystemExit(f"lens_gate = {cfg.lens_gate!r}: 'silu' or 'up'")

def main(cfg):
    check(cfg)
    if not cfg.run:
        raise SystemExit('tensor_lens.py: --run=FOLDER, the trained run to take apart')
    with memory_errors('take it apart on a device with more of it, such as --device=cpu'):
        return take_apart(cfg)

def take_apart(cfg):
    clock = time.time()
    c, model, data, device = open_finished(cfg)
    model.requires_grad_(False)
    n, T, K = min(cfg.lens_rows, len(data.val)), c['block_size'], c['n_topics']
    tokens, z = (torch.from_numpy(x[:n].astype(np.int64)).to(device) for x in (data.val, data.val_topics))
    z = z[:, :-1]
    row = cfg.lens_row if cfg.lens_row is not None else measures.runs(z)[1].argmax().item()
    if not 0 <= row < len(data.val):
        raise SystemExit(f'lens_row = {row}: the validation rows are 0 to {len(data.val) - 1}')
    if not -T <= cfg.lens_position < T:
        raise SystemExit(f'lens_position = {cfg.lens_position}: the positions are 0 to {T - 1}, or -1 for the last')

    # ---- within-topic contributions, both ways of freezing the gate
    labels, rows = measures.exchanged(z, cfg.lens_draws, torch.Generator().manual_seed(c['seed']))
    labels = torch.cat([z[None], labels])                                      # [1 + draws, n, T]
    within, excess = {}, {}
    for gate in GATES:
        sums, by_topic, positions = contributions(model, tokens, labels, rows, K, gate,
                                                  rows_at_a_time(c, len(labels) * K + 1, device))
        within[gate] = {}
        for name, share in within_shares(sums.cpu()).items():                  # [L + 3, 1 + draws]
            if name.startswith('norm'):
                share = share[:-1]                                             # a logit has no norm
            value, chance = share[:, 0], share[:, 1:].mean(1)
            within[gate][name] = {'value': value, 'chance': chance,
                                  'chance_sd': share[:, 1:].std(1) if cfg.lens_draws > 1 else None}
            excess[gate, name] = value - chance
        _, whole, mine, self_, *_ = (sums[-1, :, 0] / sums[-1, 0, 0]).tolist()
        within[gate] |= {'self': sums[:-1, 3, 0] / sums[:-1, 0, 0],            # share of the position's own token
                         'logit': {'all': whole, 'own_topic': mine, 'own_token': self_},               # nats
                         'by_topic': torch.where(positions[:, None] > 0, by_topic / positions[:, None], torch.nan)}

    missing = [k for k in range(K) if not positions[k]]
    if missing:
        print(f'{cfg.run}: topic {", ".join(map(str, missing))}: no token that counts (after one of another topic, in '
              'a row that has another with as many runs); null in lens.json, more --lens_rows may have some')

    # ---- one logit, token by token
    at = cfg.lens_position % T
    x, topics = (torch.from_numpy(a[row].astype(np.int64)).to(device) for a in (data.val, data.val_topics))
    strip = {'row': row, 'position': at, 'target': x[at + 1].item(), 'tokens': x[:at + 1].tolist(),
             'topics': topics[:at + 1].tolist(), 'target_topic': topics[at + 1].item(),
             'contribution': {g: token_contributions(model, x[:-1], at, x[at + 1], g)[:at + 1] for g in GATES}}
    strip['logit'] = strip['contribution'][cfg.lens_gate].sum().item()

    other = GATES[cfg.lens_gate == 'silu']
    result = {
        'condition': c['condition'], 'seed': c['seed'], 'recal_steps': c['recal_steps'], 'keep_rope': c['keep_rope'],
        'n_topics': K, 'block_size': T, 'rows': n, 'rows_counted': int(rows.sum()), 'positions': int(positions.sum()),
        'depths': ['embedding', *(f'layer {i + 1}' for i in range(c['n_layer'])), 'norm', 'logit'],
        'gate': cfg.lens_gate, 'within': tidy(within),
        'gate_difference': {k: tidy(excess[cfg.lens_gate, k] - excess[other, k]) for k in WITHIN},     # of the excess
        'strip': tidy(strip, 4), **versions(device), 'settings': {k: getattr(cfg, k) for k in SETTINGS},
        'seconds': round(time.time() - clock, 2)}
    shards.write_json(os.path.join(cfg.run, 'lens.json'), result)
    def last(gate, name, form='.3f'):
        found = result['within'][gate][name]
        return f'{show(found["value"][-2], form)} (chance {show(found["chance"][-2], form)})'
    print(f'{cfg.run}: within-topic contribution to the final state {last(cfg.lens_gate, "projection")}, without the '
          f'own token {last(cfg.lens_gate, "projection_others")}; with the other factor of SwiGLU frozen '
          f'{last(other, "projection")} and {last(other, "projection_others")}; {result["seconds"]:.0f} s')
    return result

if __name__ == '__main__':
    main(configure(__file__))
