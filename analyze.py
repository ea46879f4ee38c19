"""
Measure a trained run: attention, probes, circuits and the operator by topic, into row.json of its folder.

    python analyze.py --run=out/single/mha_topic_ordered_rope/seed0

Runs the checkpoint in fp32 over the first validation rows, layer by layer, every pattern causal. The measures
are defined in measures.py and tensor_lens.py. examples.json beside the row has the attention of two heads on
one row, as pictures. --causal=False is for one comparison only: it takes the mask away, as the log's own
analysis did, and writes the two columns that this gives (entropy, within share) to unmasked.json.
"""
import base64
import os
import time
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import measures
import runs
import tensor_lens
from configurator import command
from machine import memory_errors, progress, versions
from model import build
from train import open_finished

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run
analysis_rows = 400         # validation rows, the first ones [4, 2**31)
probe_tokens = 50_000       # at most, half to train the probes and half, from other rows, to test them [100, 2**31)
null_draws = 1000           # label exchanges behind O's z and p [1, 2**31)
lens_rows = 200             # validation rows taken apart by topic, the first ones [2, 2**31)
lens_draws = 5              # label exchanges behind the chance level of that [1, 2**31)
causal = True               # false: the log's unmasked columns instead
device = ''                 # as in train.py

# -----------------------------------------------------------------------------

SETTINGS = ('analysis_rows', 'probe_tokens', 'null_draws', 'lens_rows', 'lens_draws')      # kept in the row
NO_REFERENCES = dict.fromkeys(('uniform', 'bigram', 'filter', 'oracle'))        # of a dataset that has none

def outcome(val_loss, references):
    """
    Where the validation loss lies between the topic-blind bigram and the Bayes filter; None where there is
    none.
    """
    bigram, best = references['bigram'], references['filter']
    found = {'val_loss': val_loss, 'references': references, 'excess': None, 'gap_closed': None}
    if best is not None:
        found['excess'] = val_loss - best
        if bigram - best > 0.01:
            found['gap_closed'] = (bigram - val_loss) / (bigram - best)
    return found

# -----------------------------------------------------------------------------
# rows and patterns

def validation_rows(cfg, c, data, device):
    """
    The rows that are looked at: whole [n, T + 1], tokens and topics [n, T]; train and test, bool [n, T]: the
    tokens of the probes, of different rows; batches: slices of rows whose patterns fit in memory.
    """
    n, T = min(cfg.analysis_rows, len(data.val)), c['block_size']
    if n < 4:
        raise SystemExit(f'analyze.py: {len(data.val)} validation rows; at least 4 are needed')
    whole = torch.tensor(data.val[:n].astype(int), device=device)
    topics = torch.tensor(data.val_topics[:n, :-1].astype(int), device=device)
    generator = torch.Generator().manual_seed(c['seed'])
    masks = []
    for tokens in measures.probe_tokens(n, T, cfg.probe_tokens, generator):
        mask = torch.zeros(n * T, dtype=torch.bool)
        mask[tokens] = True
        masks.append(mask.view(n, T).to(device))
    memory = 4 << 30 if device.type == 'cuda' else 256 << 20
    size = max(1, memory // (c['n_head'] * T * T * 40))                        # patterns in fp64, several copies
    starts = range(0, n, size)
    return SimpleNamespace(
        whole=whole,
        tokens=whole[:, :-1],
        topics=topics,
        train=masks[0],
        test=masks[1],
        batches=[slice(start, start + size) for start in starts])

def pass_over(model, rows, desc, allowed=None, causal=True):
    """
    One pass over the rows, layer by layer: hidden states at the probes' tokens, [L + 1][train, test] of [n,
    n_embd], and the attention sums of each layer [L], where its allowed keys [L] of [T, T] are given.
    """
    states, sums = {}, {}
    for b in progress(rows.batches, desc=desc, unit='batch', leave=False):
        for depth, (hidden, pattern) in enumerate(model.trace(rows.tokens[b], causal)):
            part = hidden[rows.train[b]], hidden[rows.test[b]]
            states.setdefault(depth, []).append(part)
            if allowed and pattern is not None:
                keys = allowed[depth - 1]
                part = measures.attention_sums(pattern, rows.topics[b], keys)
                sums[depth] = measures.add(sums.get(depth), part)
    joined = []
    for parts in states.values():
        joined.append([torch.cat(split) for split in zip(*parts)])
    return joined, list(sums.values())

def head_table(sums, draws, seed):
    """
    Every measure of every head, {name: [L, H]}, from the sums of each layer; the same null draws for all of
    them.
    """
    nulls = [measures.o_null(s, draws, seed) for s in sums]
    layers = [measures.head_measures(s, null) for s, null in zip(sums, nulls)]
    heads = {}
    for name in layers[0]:
        heads[name] = np.stack([layer[name] for layer in layers])
    T, sd, drawn = (np.concatenate(parts, axis=-1) for parts in zip(*nulls))
    heads['o_p_max'] = measures.max_statistic(T, sd, drawn).reshape(len(sums), -1)
    return heads

def unmasked(run, model, rows):
    """What the log's own analysis saw, attention without the causal mask, beside uniform; into unmasked.json."""
    keys = torch.ones_like(model.allowed(0, rows.tokens.size(1)))
    allowed = [keys] * len(model.model.layers)
    _, sums = pass_over(model, rows, 'unmasked', allowed, causal=False)
    heads = head_table(sums, draws=1, seed=0)
    mean = {name: heads[name].mean() for name in ('entropy', 'within_all')}
    chance = measures.uniform_measures(rows.topics, keys)
    result = {'causal': False, 'mean': mean, 'uniform': chance}
    runs.write_json(os.path.join(run, 'unmasked.json'), result)
    print(f'{run}, no causal mask (the log\'s columns): entropy {mean["entropy"]:.2f} nats, '
          f'within {mean["within_all"]:.1%}, uniform attention {chance["within_all"]:.1%}')

@torch.no_grad()
def ranks(model):
    """
    Effective ranks of the QK and OV circuits, {name: [L, H]}; QK's is left out where positions are not Qwen3's.
    """
    qk, ov = [], []
    for block in model.model.layers:
        attn, g1 = block.self_attn, block.input_layernorm.weight
        gains = g1, attn.q_norm.weight, attn.k_norm.weight
        qk.append(measures.qk_rank(attn.q_proj.weight, attn.k_proj.weight, *gains))
        ov.append(measures.ov_rank(attn.o_proj.weight, attn.v_proj.weight, g1, attn.head_dim))
    found = {'ov_rank': torch.stack(ov).cpu().numpy()}
    if model.stock_positions():
        found['qk_rank'] = torch.stack(qk).cpu().numpy()
    return found

def example(model, rows, score):
    """
    The most topical head, by P [L, H], on the first row with most runs: its pattern as a picture in JSON,
    max-pooled to at most 256 a side, a byte a cell, zlib, base64.
    """
    row = measures.runs(rows.topics)[1].argmax()
    best = np.nan_to_num(score).argmax()
    layer, head = divmod(int(best), score.shape[1])
    patterns = [pattern for _, pattern in model.trace(rows.tokens[row][None])]
    pattern = patterns[layer + 1][:, head]                                     # [1, T, T]
    pool = -(-pattern.size(1) // 256)
    small = F.max_pool2d(pattern, pool, ceil_mode=True)[0]
    cells = (small / small.max() * 255).round().byte()                         # [T / pool, T / pool]
    deflated = zlib.compress(cells.cpu().numpy().tobytes(), 9)
    return {
        'layer': layer,
        'head': head,
        'score_p': score[layer, head],
        'topics': rows.topics[row, ::pool],
        'shape': cells.shape,
        'max': small.max(),
        'uint8': base64.b64encode(deflated).decode()}

# -----------------------------------------------------------------------------
# probes

def named_rightly(rows, states, labels, desc):
    """For each depth, which test tokens [n] a probe names rightly; labels: [n, T]."""
    found = []
    for train, test in progress(states, desc=desc, unit='layer', leave=False):
        guess = measures.probe(train, labels[rows.train], test)
        right = guess == labels[rows.test]
        found.append(right.cpu().numpy())
    return found

def probe_table(c, rows, states, untrained, embedded, posterior):
    """
    Accuracy of the topic probe by depth, beside what else would name topics: the most frequent one, tokens
    alone, the mean of the last embeddings [n, T, n_embd], the untrained model, the Bayes filter's posterior [n,
    T, K]; and what a probe can remember, a random fixed label for each token type. After the last layer by
    distance from a boundary, too.
    """
    labels = measures.control_labels(c['vocab_size'], c['n_topics'], c['seed'])
    control = labels.to(rows.tokens.device)[rows.tokens]
    means = measures.running_mean(embedded)
    running = [[means[rows.train], means[rows.test]]]
    right = named_rightly(rows, states, rows.topics, 'probes')
    others = {
        'untrained': named_rightly(rows, untrained, rows.topics, 'untrained'),
        'control': named_rightly(rows, states, control, 'control task'),
        'running_mean': named_rightly(rows, running, rows.topics, 'running mean')}
    references = {}
    for name, found in others.items():
        references[name] = [k.mean() for k in found]
    references['running_mean'] = references['running_mean'][0]

    x_train = rows.tokens[rows.train].cpu().numpy()
    x_test = rows.tokens[rows.test].cpu().numpy()
    y_train = rows.topics[rows.train].cpu().numpy()
    y_test = rows.topics[rows.test].cpu().numpy()
    references['majority'] = measures.majority(y_train, y_test)
    references['token'] = measures.token_identity(x_train, y_train, x_test, y_test, c['vocab_size'])
    distance = measures.distance_from_boundary(rows.topics)[rows.test].cpu().numpy()
    by_distance = measures.by_distance(right[-1], distance)
    if posterior is not None:
        best = posterior[rows.test.cpu().numpy()].argmax(-1) == y_test
        references['ceiling'] = best.mean()
        by_distance['ceiling'] = measures.by_distance(best, distance)['accuracy']
    return {
        'accuracy': [k.mean() for k in right],
        'references': references,
        'by_distance': by_distance}

# -----------------------------------------------------------------------------

def main(cfg):
    if not cfg.run:
        raise SystemExit('analyze.py: --run=FOLDER, the trained run to analyse')
    runs.read_config(cfg.run)                               # stops where there is no run
    with memory_errors('analyse on a device with more of it, such as --device=cpu'), runs.locked(cfg.run):
        analyse(cfg)

def analyse(cfg):
    clock = time.time()
    c, model, data, device = open_finished(cfg.run, cfg.device)
    records = runs.read_log(cfg.run)
    if not records or records[-1]['val_loss'] is None:
        raise SystemExit(f'{cfg.run}/log.jsonl: missing or not whole; delete that folder and train again')
    rows = validation_rows(cfg, c, data, device)
    if not cfg.causal:
        return unmasked(cfg.run, model, rows)

    # ---- the model, and the same untrained, over the rows
    allowed = []
    for layer in range(c['n_layer']):
        allowed.append(model.allowed(layer, c['block_size']))
    desc = f'analyse {os.path.relpath(cfg.run)}'
    states, sums = pass_over(model, rows, desc, allowed)
    fresh = build(c, torch.Generator().manual_seed(c['seed'])).to(device)
    untrained, _ = pass_over(fresh, rows, 'untrained')

    # ---- attention and circuits, beside their levels without structure
    heads = head_table(sums, cfg.null_draws, c['seed']) | ranks(model)
    mean = {name: np.ma.masked_invalid(x).mean() for name, x in heads.items()}
    by_layer = [measures.uniform_measures(rows.topics, keys) for keys in allowed]
    uniform = {name: np.mean([x[name] for x in by_layer]) for name in by_layer[0]}
    init_rank = {name: x.mean(1) for name, x in ranks(fresh).items()}          # [L]
    for name, x in init_rank.items():
        uniform[name] = x.mean()

    # ---- probes, and the operator by topic
    embedded = model.model.embed_tokens(rows.tokens).detach()
    posterior = data.val_posterior
    if posterior is not None:
        posterior = posterior[:len(rows.tokens), :-1]
    probe = probe_table(c, rows, states, untrained, embedded, posterior)
    n = cfg.lens_rows
    draws = c['n_topics'], cfg.lens_draws, c['seed']
    lens = tensor_lens.own_topic_shares(model, rows.whole[:n], rows.topics[:n], *draws)

    # ---- the row comes last: it says that all is done
    shown = example(model, rows, heads['score_p'])
    runs.write_json(os.path.join(cfg.run, 'example.json'), shown)
    references = NO_REFERENCES | (data.meta.get('references') or {})
    seconds = {'train': records[-1]['seconds'], 'analysis': time.time() - clock}
    row = runs.columns(c) | {
        'main': runs.is_main(cfg.run),
        'measures_version': measures.VERSION,
        **outcome(records[-1]['val_loss'], references),
        'orderedness': runs.orderedness(records),
        'mean': mean,
        'uniform': uniform,
        'heads': heads,
        'init_rank': init_rank,
        'probe': probe,
        'lens': lens,
        'curve': runs.curve(records),
        'settings': {key: getattr(cfg, key) for key in SETTINGS},
        **versions(device),
        'seconds': seconds,
        'config': c}
    runs.write_json(os.path.join(cfg.run, 'row.json'), row)
    middle = c['n_layer'] // 2
    P = runs.show(runs.plain(mean['score_p']), '.3f')
    print(f'{cfg.run}: val loss {row["val_loss"]:.4f}, P {P}, probe[{middle}] {probe["accuracy"][middle]:.3f}, '
          f'{seconds["analysis"]:.0f} s')

if __name__ == '__main__':
    command(main, __file__)
