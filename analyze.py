"""
Measure a trained run: attention, probes and circuits, into analysis.json of its folder.

    python analyze.py --run=out/single/mha_topic_ordered_rope/seed0

Runs the checkpoint in fp32 over the first validation rows, layer by layer, every pattern causal. The measures are
defined in measures.py. --causal=False is for one comparison only: it takes the mask away, as the log's own analysis
did, and writes the two columns that this gives (entropy, within share) to analysis_unmasked.json.
"""
import base64
import contextlib
import json
import math
import os
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import measures
import shards
from compare import orderedness
from configurator import at_least, configure
from model import build, load_weights, read_config, read_finished
from train import machine, memory_errors, progress, read_data, versions

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run
analysis_rows = 400         # validation rows, the first ones
probe_tokens = 50_000       # at most, half to train the probes and half, from other rows, to test them
null_draws = 1000           # label exchanges behind O's z and p
ablation_draws = 5          # sets of random heads that are ablated beside the topical ones
light = False               # true: losses, P, O and probes alone, without null, controls, ablation and circuits
causal = True               # false: the log's unmasked columns instead
device = ''                 # as in train.py

# -----------------------------------------------------------------------------

SETTINGS = ('analysis_rows', 'probe_tokens', 'null_draws', 'ablation_draws', 'light')      # kept in analysis.json
ABLATED = (1, 2, 4, 8)      # heads at a time
NEAR, FAR = 4, 32           # right after a boundary: fewer tokens than this; far from one: at least this many

def tidy(x, digits=6):
    """Arrays and floats as JSON: nested lists, that many significant digits, nan as null."""
    if isinstance(x, dict):
        return {k: tidy(v, digits) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray, torch.Tensor)):
        return [tidy(v, digits) for v in (x.tolist() if hasattr(x, 'tolist') else x)]
    if isinstance(x, float):
        return float(f'{x:.{digits}g}') if math.isfinite(x) else None
    return x

def row_batches(n_rows, n_head, T, device):
    """Slices of rows whose patterns, in fp64 and several copies, fit in memory; none crosses the middle."""
    size = max(1, (4 << 30 if device.type == 'cuda' else 256 << 20) // (n_head * T * T * 40))
    half = n_rows // 2
    cuts = [*range(0, half, size), *range(half, n_rows, size), n_rows]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:])]

def pattern_map(pattern, topics, which, layer, head, score_p):
    """A pattern [T, T] as a picture in JSON: max-pooled to at most 256 a side, one byte a cell, zlib, base64."""
    pool = -(-len(pattern) // 256)
    small = F.max_pool2d(pattern[None, None], pool, ceil_mode=True)[0, 0]                  # [T/pool, T/pool]
    top = small.max().item()
    cells = (small / top * 255).round().byte().cpu().numpy()
    return {'which': which, 'layer': layer, 'head': head, 'score_p': score_p, 'topics': topics[::pool].tolist(),
            'shape': list(cells.shape), 'max': top,
            'uint8': base64.b64encode(zlib.compress(cells.tobytes(), 9)).decode()}

@torch.no_grad()
def circuits(model, theta, probes):
    """
    Singular values and effective ranks of QK (at distances 0, 1, 16 where there is RoPE) and OV, [L][H]... Alignment,
    [L][H], of what queries and keys read with what the topic probe before the layer reads (directions of probes[l],
    [n_embd, K - 1]), and of what OV writes with what the probe after the layer reads.
    """
    layers = [(b.self_attn, b.input_layernorm.weight) for b in model.model.layers]
    ov = [measures.ov_svd(a.o_proj.weight, a.v_proj.weight, g1, a.head_dim) for a, g1 in layers]
    found = {'qk': {}, 'ov': torch.stack([S for _, S, _ in ov]), 'alignment': {'query': {}, 'key': {}}}
    align = lambda vectors, bases: torch.stack([measures.alignment(v, basis) for v, basis in zip(vectors, bases)])
    found['alignment']['written'] = align([U for U, _, _ in ov], probes[1:])
    for distance in (0, 1, 16) if model.rope else (0,):
        qk = [measures.qk_svd(a.q_proj.weight, a.k_proj.weight, g1, a.q_norm.weight, a.k_norm.weight, distance, theta)
              for a, g1 in layers]
        found['qk'][str(distance)] = torch.stack([S for _, S, _ in qk])
        found['alignment']['query'][str(distance)] = align([U for U, _, _ in qk], probes)
        found['alignment']['key'][str(distance)] = align([V for _, _, V in qk], probes)
    found['qk_rank'] = {d: measures.effective_rank(s) for d, s in found['qk'].items()}
    return found | {'ov_rank': measures.effective_rank(found['ov'])}

@contextlib.contextmanager
def ablated(model, means, heads):
    """The model with the outputs of some heads, [(layer, head)], replaced by their means [L][T, n_head * head_dim]."""
    def replace(attention, mean, which):
        def hook(_, args):
            y = args[0].clone()                                                            # [B, T, n_head * head_dim]
            for h in which:
                part = slice(h * attention.head_dim, (h + 1) * attention.head_dim)
                y[..., part] = mean[:, part]
            return (y,)
        return attention.o_proj.register_forward_pre_hook(hook)
    hooks = [replace(model.model.layers[layer].self_attn, means[layer], [h for at, h in heads if at == layer])
             for layer in {layer for layer, _ in heads}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

@torch.no_grad()
def ablation(model, tokens, topics, score, entropy, draws, seed):
    """
    What the most topical heads are for: losses on the second half of the rows with k heads mean-ablated, the means and
    the ranking from the first half, beside k random and k heads of like entropy. tokens and topics [n, T + 1], score
    and entropy [L, H]. near: the loss on the first tokens after a boundary, far: on those well inside a run; nats.
    """
    half, generator, means = len(tokens) // 2, torch.Generator().manual_seed(seed), {}
    at = lambda part: ((x[:, :-1], x[:, 1:]) for x in part.split(16))
    hooks = [b.self_attn.o_proj.register_forward_pre_hook(
        lambda _, args, layer=layer: means.__setitem__(layer, means.get(layer, 0) + args[0].sum(0) / half))
        for layer, b in enumerate(model.model.layers)]
    for x, y in at(tokens[:half]):
        model(x, y)
    for hook in hooks:
        hook.remove()
    distance = measures.distance_from_boundary(topics[half:])[:, 1:]                       # of the token predicted
    def losses(heads):
        with ablated(model, means, heads):
            loss = torch.cat([model(x, y) for x, y in at(tokens[half:])])                  # [n / 2, T]
        parts = {'loss': loss, 'near': loss[(distance >= 0) & (distance < NEAR)], 'far': loss[distance >= FAR]}
        return {k: v.mean().item() for k, v in parts.items()}
    result = {'k': [k for k in ABLATED if k <= max(1, score.size // 4)], 'near_below': NEAR, 'far_from': FAR,
              'none': losses([]), 'topical': [], 'random': [], 'entropy': []}
    for k in result['k']:
        picks = [measures.ablation_heads(score, entropy, k, generator) for _ in range(draws)]
        sets = [losses(pick['random']) for pick in picks]
        result['topical'].append(losses(picks[0]['top']))
        result['entropy'].append(losses(picks[0]['matched']))
        result['random'].append({key: float(np.mean([s[key] for s in sets])) for key in sets[0]})
    return result

@torch.no_grad()
def reading(model, folder, tokens, topics, score, row, batches):
    """
    What the most topical heads read, where the dataset has a tokenizer; (None, None) where it has none.

    Ranked by score [L, H]. words: one row of tokens, its topics and the attention that its last token pays to each, for
    the most and the least topical head. attends: for the three most topical heads, over the rows of `batches`, the
    kinds of token that get the most attention over their share under uniform attention, pairs as in P (16 apart and
    more, not the first token), and the share of the query's topic in that attention (`same`) beside the uniform one.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        return None, None
    from tokenizers import Tokenizer
    decode, H, T = Tokenizer.from_file(path).decode, score.shape[1], tokens.size(1)
    V = len(model.model.embed_tokens.weight)
    ranked = np.nan_to_num(score).ravel().argsort()[::-1]
    best = [divmod(int(i), H) for i in ranked[:3]]
    text = {'tokens': [decode([i]) for i in tokens[row].tolist()], 'topics': topics[row].tolist(), 'heads': []}
    last = {layer: p[0, :, -1] for layer, (_, p) in enumerate(model.trace(tokens[row:row + 1]), -1) if p is not None}
    for which, (layer, head) in (('most topical', best[0]), ('least topical', divmod(int(ranked[-1]), H))):
        text['heads'].append({'which': which, 'layer': layer, 'head': head, 'score_p': float(score[layer, head]),
                              'weights': last[layer][head].tolist()})
    t = torch.arange(T, device=tokens.device)
    pairs = (t[:, None] - t >= 16) & (t >= 1)                                              # [query, key]
    uniform = (pairs / (t[:, None] + 1)).float()
    mass, by_chance = torch.zeros(len(best), V, device=tokens.device), torch.zeros(V, device=tokens.device)
    same, count = torch.zeros(len(best) + 1, device=tokens.device), torch.zeros(V, device=tokens.device)
    for b in batches:
        keys, alike = tokens[b].flatten(), topics[b][:, :, None] == topics[b][:, None]     # alike [B, T, T]
        by_chance.index_add_(0, keys, uniform.sum(0).repeat(len(tokens[b])))
        count.index_add_(0, keys, torch.ones_like(keys, dtype=torch.float))
        same[-1] += (uniform * alike).sum()
        for layer, (_, pattern) in enumerate(model.trace(tokens[b]), -1):
            for i, (at, head) in enumerate(best):
                if at == layer:
                    far = pattern[:, head] * pairs                                         # [B, T, T]
                    mass[i].index_add_(0, keys, far.sum(1).flatten())
                    same[i] += (far * alike).sum()
    attends = []
    for i, (layer, head) in enumerate(best):
        ratio = (mass[i] / mass[i].sum()) / (by_chance / by_chance.sum())
        ratio[count < max(5, 1e-4 * count.sum())] = 0                                      # rare: chance
        top = ratio.nan_to_num(0).argsort(descending=True)[:12].tolist()
        attends.append({'layer': layer, 'head': head, 'score_p': float(score[layer, head]),
                        'tokens': [[decode([j]), float(ratio[j])] for j in top if ratio[j] > 0],
                        'same': (same[i] / mass[i].sum()).item(), 'same_uniform': (same[-1] / by_chance.sum()).item()})
    return text, attends

def show(x, form):
    """A number, or a dash where it is undefined."""
    return '—' if x is None else format(x, form)

def open_finished(cfg):
    """(config, model, dataset, device) of the run cfg.run, which must have made all its steps."""
    c = read_config(cfg.run)
    ckpt = read_finished(cfg.run, c)
    device, _, _ = machine(cfg.device)
    data = read_data(c, cfg.run)
    return c, load_weights(build(c), ckpt, cfg.run).to(device).eval(), data, device

def check(cfg):
    """Stops with one line at the first setting that can't work."""
    at_least(cfg, analysis_rows=4, probe_tokens=100, null_draws=1, ablation_draws=1)

def main(cfg):
    check(cfg)
    if not cfg.run:
        raise SystemExit('analyze.py: --run=FOLDER, the trained run to analyse')
    with memory_errors('analyse on a device with more of it, such as --device=cpu'):
        return analyse(cfg)

def analyse(cfg):
    clock = time.time()
    c, model, data, device = open_finished(cfg)
    try:
        records = [json.loads(line) for line in open(os.path.join(cfg.run, 'log.jsonl'))]
        records[-1]['val_loss']
    except (OSError, ValueError, LookupError):
        raise SystemExit(f'{cfg.run}/log.jsonl: missing or not whole; delete that folder and train again') from None
    n_rows, T, L, H = min(cfg.analysis_rows, len(data.val)), c['block_size'], c['n_layer'], c['n_head']
    if n_rows < 4:
        raise SystemExit(f'analyze.py: {len(data.val)} validation rows; at least 4 are needed')
    tokens = torch.from_numpy(data.val[:n_rows, :-1].astype(np.int64)).to(device)          # [n_rows, T]
    z = torch.from_numpy(data.val_topics[:n_rows, :-1].astype(np.int64)).to(device)
    batches = row_batches(n_rows, H, T, device)

    # ---- the log's columns, for comparison
    if not cfg.causal:
        parts = [[measures.unmasked_measures(pattern, z[b]) for _, pattern in model.trace(tokens[b], causal=False)
                  if pattern is not None] for b in progress(batches, desc='unmasked', unit='batch')]
        mean = {k: torch.cat([torch.stack([layer[k] for layer in p]) for p in parts], 1).mean().item()
                for k in ('entropy', 'within_all')}
        result = {'causal': False, 'mean': tidy(mean), 'uniform': tidy(measures.uniform_measures(z, causal=False))}
        shards.write_json(os.path.join(cfg.run, 'analysis_unmasked.json'), result)
        print(f'{cfg.run}, no causal mask (the log\'s columns): entropy {mean["entropy"]:.2f} nats, '
              f'within {mean["within_all"]:.1%}, uniform attention {result["uniform"]["within_all"]:.1%}')
        return result

    # ---- one pass over the rows: sums of each layer for each half of the rows, activations at the probes' tokens
    generator = torch.Generator().manual_seed(c['seed'])
    probe_at = measures.probe_tokens(n_rows, T, cfg.probe_tokens, generator)               # indices into rows x T
    sums = [[None] * L, [None] * L]
    half = n_rows // 2
    free, known = [None] * L, [None] * L                    # content-free fit, mean pattern: of the first half
    overlap = [[[], []] for _ in range(L)]
    def activations(model, desc, attend=lambda *_: None):
        """Hidden states at the probes' tokens, [L + 1][train, test] of [n, n_embd]; patterns go to `attend`."""
        found = [[[], []] for _ in range(L + 1)]
        for b in progress(batches, desc=desc, unit='batch', leave=False):
            for layer, (hidden, pattern) in enumerate(model.trace(tokens[b])):
                flat = hidden.flatten(0, 1)                                                # [rows * T, n_embd]
                for split, at in enumerate(probe_at):
                    mine = at[(at >= b.start * T) & (at < b.stop * T)] - b.start * T
                    found[layer][split].append(flat[mine.to(device)])
                if pattern is not None:
                    attend(layer - 1, pattern, b)
        return [[torch.cat(part) for part in parts] for parts in found]
    def attend(layer, pattern, b):
        mine = sums[b.start >= half]
        mine[layer] = measures.add(mine[layer], measures.attention_sums(pattern, z[b], c['n_topics']))
        if b.start >= half and not cfg.light:
            if free[layer] is None:
                known[layer] = sums[0][layer]['S'] / half
                free[layer] = measures.free_fit(known[layer])
            for found, pattern_of in zip(overlap[layer], (free[layer], known[layer])):
                found.append(measures.overlap(pattern, pattern_of))
    states = activations(model, f'analyse {os.path.relpath(cfg.run)}', attend)

    # ---- attention
    p_half = np.stack([measures.score_p(s) for s in sums[0]])                              # [L, H], on half the rows
    entropy_half = np.stack([(s['entropy'].mean(0) / T).cpu().numpy() for s in sums[0]])
    layers = [measures.add(a, b) for a, b in zip(*sums)]
    nulls = [measures.o_null(s, 1 if cfg.light else cfg.null_draws, seed=c['seed']) for s in layers]
    by_layer = [measures.head_measures(s, null=n) for s, n in zip(layers, nulls)]          # same draws for all heads
    heads = {name: np.stack([m[name] for m in by_layer]) for name in by_layer[0]}          # name -> [L, H]
    maps, ablation_of, words, attends = [], None, None, None
    if cfg.light:
        del heads['o_z'], heads['o_p']
    else:
        joined = (np.concatenate(parts, axis=-1) for parts in zip(*nulls))
        heads['o_p_max'] = measures.max_statistic(*joined).reshape(L, H)
        for k, name in enumerate(('free_fit', 'free_ceiling')):
            heads[name] = torch.stack([torch.cat(layer[k]).mean(0) for layer in overlap]).cpu().numpy()
        # the heads to look at are chosen on one half of the rows and drawn from the other: its first row of most runs
        row = half + measures.runs(z[half:].cpu())[1].argmax().item()
        patterns = [p[0] for _, p in model.trace(tokens[row:row + 1]) if p is not None]    # L of [H, T, T]
        ranked = np.nan_to_num(p_half).ravel().argsort()
        maps = [pattern_map(patterns[i // H][i % H], z[row].cpu(), which, i // H, i % H, tidy(float(p_half.flat[i])))
                for which, i in (('most topical', int(ranked[-1])), ('least topical', int(ranked[0])))]
        others = [b for b in batches if b.start >= half]
        words, attends = reading(model, data.folder, tokens, z, p_half, row, others)
        whole = (torch.from_numpy(x[:n_rows].astype(np.int64)).to(device) for x in (data.val, data.val_topics))
        ablation_of = ablation(model, *whole, p_half, entropy_half, cfg.ablation_draws, c['seed'])

    # ---- probes: train and test tokens come from different rows
    train_at, test_at = (at.to(device) for at in probe_at)
    x, y = tokens.flatten(), z.flatten()
    distance = measures.distance_from_boundary(z).flatten()[test_at].cpu().numpy()
    def guesses(states, labels, desc='probes', directions=None):
        """For each layer, which test tokens a probe trained on labels [n_rows * T] names rightly; what the probes read
        is put into the list `directions`."""
        correct = []
        for train, test in progress(states, desc=desc, unit='layer', leave=False):
            fitted = measures.fit_probe(train, labels[train_at])
            correct.append((measures.probe_guess(fitted, test) == labels[test_at]).cpu().numpy())
            if directions is not None:
                directions.append(measures.probe_directions(fitted))
        return correct
    read, read_at_init = [], []                             # of each layer: [n_embd, K - 1]
    correct = guesses(states, y, directions=read)
    by_distance = [measures.by_distance(k, distance) for k in correct]
    y_train, y_test, x_train, x_test = (v[at].cpu().numpy() for v in (y, x) for at in (train_at, test_at))
    probe = {'accuracy': [k.mean() for k in correct], 'train_tokens': len(train_at), 'test_tokens': len(test_at),
             'majority': measures.majority(y_train, y_test), 'ceiling': None, 'ceiling_by_distance': None,
             'token': measures.token_identity(x_train, y_train, x_test, y_test, c['vocab_size']),
             'distance': by_distance[0]['distance'], 'by_distance': [d['accuracy'] for d in by_distance],
             'count_by_distance': by_distance[0]['count']}
    posterior = data.val_posterior
    if posterior is None and not cfg.light:                 # no Bayes filter: what the words so far tell by themselves
        probe['bag'] = measures.bag_of_tokens(tokens.cpu().numpy(), z.cpu().numpy(), *(at.numpy() for at in probe_at),
                                              c['vocab_size'])
    if posterior is not None:
        posterior = torch.from_numpy(np.asarray(posterior[:n_rows, :-1], np.float32)).to(device).flatten(0, 1)
        guess = posterior[test_at].cpu().numpy()
        probe['ceiling'] = measures.posterior_accuracy(guess, y_test)
        probe['ceiling_by_distance'] = measures.by_distance(guess.argmax(-1) == y_test, distance)['accuracy']
    if not cfg.light:
        fresh = build(c, torch.Generator().manual_seed(c['seed'])).to(device)
        embedded = model.model.embed_tokens(tokens).detach()                               # [n_rows, T, n_embd]
        running = {}
        for window in (None, 8, 32, 128):
            (name, means), = measures.running_means(embedded, (window,)).items()
            means = means.flatten(0, 1)
            running[name] = guesses([[means[train_at], means[test_at]]], y, f'running means, {name}')[0].mean()
        control = measures.control_labels(c['vocab_size'], c['n_topics'], c['seed']).to(device)[x]
        mixed = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(c['seed'])).to(device)]
        shuffled = measures.probe(states[L // 2][0], mixed[train_at], states[L // 2][1]) == y[test_at]
        probe |= {'running_mean': running, 'shuffled': shuffled.double().mean().item(),
                  'init': [k.mean() for k in guesses(activations(fresh, 'random init'), y, 'probes of random init',
                                                     read_at_init)],
                  'control': [k.mean() for k in guesses(states, control, 'control task')],
                  'baseline': max(probe['majority'], probe['token'], probe.get('bag', 0), *running.values()),
                  'normalised': None, 'posterior_r2': None}
        probe['selectivity'] = [a - b for a, b in zip(probe['accuracy'], probe['control'])]
        if posterior is not None:
            room = probe['ceiling'] - probe['baseline']
            if room > 0.01:                                 # 0: nothing beyond simple statistics, 1: the Bayes filter
                probe['normalised'] = [(a - probe['baseline']) / room for a in probe['accuracy']]
            probe['posterior_r2'] = [measures.posterior_r2(train, posterior[train_at], test, posterior[test_at])
                                     for train, test in states]

    # ---- circuits, beside those of the same model before training
    spectra = None
    if not cfg.light:
        spectra, before = circuits(model, c['rope_theta'], read), circuits(fresh, c['rope_theta'], read_at_init)
        spectra['alignment']['chance'] = read[0].size(1) / c['n_embd']          # of random directions
        spectra['init'] = {k: before[k] for k in ('qk_rank', 'ov_rank', 'alignment')}
        spectra['init_spectra'] = {k: (s / s[..., :1]).mean((0, 1)) for k, s in (('qk', before['qk']['0']),
                                                                                 ('ov', before['ov']))}

    result = {
        'condition': c['condition'], 'seed': c['seed'], 'recal_steps': c['recal_steps'], 'keep_rope': c['keep_rope'],
        'steps': c['max_iters'], 'val_loss': records[-1]['val_loss'], 'train_seconds': records[-1]['seconds'],
        'orderedness': orderedness(records),                # of the whole log: what is published is thinned
        'references': data.meta.get('references') or dict.fromkeys(('uniform', 'bigram', 'filter', 'oracle')),
        'n_topics': c['n_topics'], 'block_size': T, 'rows': n_rows, 'causal': True, **versions(device),
        'heads': tidy(heads), 'mean': tidy({k: float(np.nanmean(v)) if not np.isnan(v).all() else None
                                            for k, v in heads.items()}),
        'uniform': tidy(measures.uniform_measures(z)), 'probe': tidy(probe),
        'ablation': tidy(ablation_of), 'circuits': tidy(spectra, 4), 'maps': maps,
        'words': tidy(words, 3), 'attends': tidy(attends, 4),
        'settings': {k: getattr(cfg, k) for k in SETTINGS}, 'seconds': round(time.time() - clock, 2)}
    shards.write_json(os.path.join(cfg.run, 'analysis.json'), result)
    middle = L // 2
    mean = result['mean']
    print(f'{cfg.run}: P {show(mean["score_p"], "+.3f")}, O {show(mean["score_o"], "+.3f")}, within '
          f'{show(mean["within"], ".1%")} (uniform {show(result["uniform"]["within"], ".1%")}), probe[{middle}] '
          f'{probe["accuracy"][middle]:.3f}, {result["seconds"]:.0f} s')
    return result

if __name__ == '__main__':
    main(configure(__file__))
