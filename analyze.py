"""
Measure a trained run: attention, probes, circuits and the operator by topic, into row.json of its folder.

Reads a run folder and its dataset. Writes row.json, example.json and states.npy into the folder.

    python analyze.py --run=out/single/mha_topic_ordered_rope/seed0
    python analyze.py --run=out/single/mha_topic_ordered_rope/seed0 --analysis_rows=80

Runs the checkpoint in fp32 over the first validation rows, layer by layer, every pattern causal. The measures are
defined in measures.py and tensor_lens.py. example.json has the attention of one head on one row, as a picture,
states.npy the hidden states that CKA compares. --causal=False is for one comparison only: it takes the mask away, as
the log's own analysis did, and writes the two columns that this gives (entropy, within share) to unmasked.json.
"""
import base64
import os
import time
import zlib
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data_synth
import measures
import runs
import tensor_lens
from configurator import command
from machine import machine, memory_errors, progress, versions
from model import build
from train import open_finished

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run
analysis_rows = 400         # validation rows, the first ones [8, 2**31)
probe_tokens = 50_000       # at most, half to train the probes and half, from other rows, to test them [100, 2**31)
null_draws = 1000           # label exchanges behind O's z and p [1, 2**31)
lens_rows = 200             # validation rows taken apart by topic, the first ones [2, 2**31)
lens_draws = 5              # label exchanges behind the chance level of that [1, 2**31)
causal = True               # false: the log's unmasked columns instead
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one

# -----------------------------------------------------------------------------

STATE_ROWS = 200            # rows whose states are kept for CKA
GROUPS = 8                  # of rows, every eighth in one, behind errors and halves
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
    The rows that are looked at, in equal groups: whole [n, T + 1], tokens and topics [n, T]; train and test, bool
    [n, T]: the tokens of the probes, of different rows; batches: row numbers, as many of each group and as many as
    memory takes the patterns of.
    """
    n, T = min(cfg.analysis_rows, len(data.val)), c['block_size']
    n -= n % GROUPS
    if not n:
        raise SystemExit(f'analyze.py: {len(data.val)} validation rows; at least {GROUPS} are needed')
    whole = torch.tensor(data.val[:n].astype(int), device=device)
    topics = torch.tensor(data.val_topics[:n, :-1].astype(int), device=device)
    generator = torch.Generator().manual_seed(c['seed'])
    masks = measures.probe_tokens(n, T, cfg.probe_tokens, generator)
    train, test = masks.to(device)
    memory = 4 << 30 if device.type == 'cuda' else 256 << 20
    size = GROUPS * max(1, memory // (GROUPS * c['n_head'] * T * T * 40))      # patterns in fp64, several copies
    return SimpleNamespace(
        whole=whole,
        tokens=whole[:, :-1],
        topics=topics,
        train=train,
        test=test,
        batches=torch.arange(n).split(size))

def pass_over(model, rows, desc, allowed=None, causal=True):
    """
    One pass over the rows. Returns the hidden states at the probes' tokens, [L + 1][train, test] of [n, n_embd];
    the attention sums of each layer, of each group of rows [L][GROUPS], where the keys that each layer allows, [L] of
    [T, T], are given; and the states of the middle layer, fp16 [n, T, n_embd].
    """
    states, middle = {}, []
    sums = [[None] * GROUPS for _ in model.model.layers]
    for b in progress(rows.batches, desc=desc, unit='batch', leave=False):
        for depth, (hidden, pattern) in enumerate(model.trace(rows.tokens[b], causal)):
            part = hidden[rows.train[b]], hidden[rows.test[b]]
            states.setdefault(depth, []).append(part)
            if depth == len(model.model.layers) // 2:
                middle.append(hidden.half().cpu())
            if allowed and depth:
                groups = sums[depth - 1]
                for g in range(GROUPS):
                    z = rows.topics[b[g::GROUPS]]
                    part = measures.attention_sums(pattern[g::GROUPS], z, allowed[depth - 1])
                    groups[g] = measures.add(groups[g], part)
    joined = []
    for parts in states.values():
        joined.append([torch.cat(split) for split in zip(*parts)])
    return joined, sums, torch.cat(middle)

def half_scores(sums):
    """P of every head on even and on odd rows [2, L, H], from the sums of each layer and group."""
    halves = []
    for groups in sums:
        even = measures.score_p(measures.total(groups[::2]))
        odd = measures.score_p(measures.total(groups[1::2]))
        halves.append(torch.stack([even, odd]))
    return torch.stack(halves, 1)[:, :, :-1]                # the last head is uniform attention

def row_errors(sums):
    """
    Standard error over rows of P and of excess mass, {name: [L, H]}, by the jackknife that leaves out a group at a
    time (Efron & Tibshirani 1993, eq. 11.5).
    """
    P, mass = [], []
    for groups in sums:
        without = []
        for g in range(GROUPS):
            rest = measures.total(groups[:g] + groups[g + 1:])
            both = measures.score_p(rest), measures.excess_mass(rest)
            without.append(torch.stack(both))
        spread = torch.stack(without).std(0, correction=0)  # [2, H + 1]
        error = spread[:, :-1] * (GROUPS - 1) ** 0.5
        P.append(error[0])
        mass.append(error[1])
    return {'score_p': torch.stack(P), 'excess_mass': torch.stack(mass)}

def head_table(sums, draws, seed):
    """
    Every measure, {name: [L, H + 1]}, from the sums of each layer and group, the last head uniform attention; the
    same null draws for all of them.
    """
    by_layer = []
    for groups in sums:
        whole = measures.total(groups)
        by_layer.append(measures.head_measures(whole, draws, seed))
    heads = {}
    for name in by_layer[0]:
        heads[name] = torch.stack([layer[name] for layer in by_layer])
    return heads

def unmasked(run, model, rows):
    """What the log's own analysis saw, attention without the causal mask, beside uniform; into unmasked.json."""
    keys = torch.ones_like(model.allowed(0, rows.tokens.size(1)))
    allowed = [keys] * len(model.model.layers)
    _, sums, _ = pass_over(model, rows, 'unmasked', allowed, causal=False)
    table = head_table(sums, draws=1, seed=0)
    mean = {name: table[name][:, :-1].mean() for name in ('entropy', 'within_all')}
    chance = {name: table[name][:, -1].mean() for name in mean}
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
    found = {'ov_rank': torch.stack(ov)}
    if model.stock_positions():
        found['qk_rank'] = torch.stack(qk)
    return found

def attention_columns(model, fresh, sums, draws, seed):
    """
    What a row has of attention and circuits, beside their levels without structure: uniform attention, the weights
    of the untrained model `fresh`. sums: of each layer and group [L][GROUPS]; draws, seed: of the null.
    """
    table = head_table(sums, draws, seed)
    heads = {name: x[:, :-1] for name, x in table.items()} | ranks(model)      # [L, H]
    uniform = {name: x[:, -1].mean() for name, x in table.items()}
    init_rank = {name: x.mean(1) for name, x in ranks(fresh).items()}          # [L]
    uniform |= {name: x.mean() for name, x in init_rank.items()}
    halves = half_scores(sums)
    return {
        'mean': {name: x.nanmean() for name, x in heads.items()},
        'uniform': uniform,
        'heads': heads,
        'halves': {'score_p': halves},
        'reliability': measures.reliability(halves),
        'errors': row_errors(sums),
        'init_rank': init_rank}

def example(model, rows, score):
    """
    The most topical head, by P [L, H], on the first row with most runs: its pattern as a picture in JSON,
    max-pooled to at most 256 a side, a byte a cell, zlib, base64.
    """
    row = measures.runs(rows.topics)[1].argmax()
    best = score.nan_to_num().argmax()
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
# what else the rows, and other runs, are compared with

def bigrams(meta, tokens):
    """
    The bigram that ends at each of the tokens [n, T], as a number: of tokens, or of groups in a group chain. And what
    it says of the topic, P(z | bigram) [n, T, K]; None where no chain made the data. Token 0 stands before the first.
    """
    tokens = F.pad(tokens, (1, 0))
    group, belief = tokens, None
    if meta.get('kind') == 'synthetic':
        stream, *_ = np.random.SeedSequence(meta['seed']).spawn(3)             # that of the tables
        made = data_synth.make_tables(SimpleNamespace(**meta), stream)
        P, _, row_of = (torch.from_numpy(x).to(tokens.device) for x in made)
        tables = P, row_of
        group = row_of[tokens]
        prior = data_synth.topic_given_token(tables)[tokens[:, :-1].T]         # [T, n, K]
        joint = prior * data_synth.likelihood(tokens, tables)
        belief = (joint / joint.sum(2, keepdim=True)).transpose(0, 1)
    return group[:, :-1] * meta['vocab_size'] + group[:, 1:], belief

def bigram_references(rows, meta, keys):
    """
    P and O of two heads that know one bigram at each end, on these rows and allowed keys [T, T]: {name: {'score_p',
    'score_o'}}. `equal` looks at all keys with the query's bigram alike, at all keys where none has it; `posterior`
    at each by the chance that it shares the query's topic, sum_z P(z | bigram of t) P(z | bigram of s); None without
    a chain. Both look at far keys alone, as P and O do: others would take what mass they have.
    """
    bigram, belief = bigrams(meta, rows.tokens)
    far = keys.tril(-measures.MIN_DISTANCE)
    sums = None
    for b in rows.batches:
        code = bigram[b]
        weights = [code[:, :, None] == code[:, None]]
        if belief is not None:
            weights.append(belief[b] @ belief[b].mT)
        A = (torch.stack(weights, 1).double() + 1e-9) * far                    # [B, 1 or 2, T, T]
        A = (A / A.sum(-1, keepdim=True)).nan_to_num()                         # the first queries have no far keys
        part = measures.attention_sums(A, rows.topics[b], keys)
        sums = measures.add(sums, part)
    P = measures.score_p(sums)[:-1]                                            # the last is uniform attention
    O = measures.score_o(sums)
    scores = [{'score_p': p, 'score_o': o} for p, o in zip(P, O)]
    return dict(zip_longest(('equal', 'posterior'), scores))

def compare_states(run, other, device=''):
    """CKA of the middle layer's states in two run folders, into the row of the first; nothing where one has none, or
    where they are no newer than that."""
    paths = [os.path.join(folder, 'states.npy') for folder in (run, other)]
    row, theirs = runs.read_row(run), runs.read_row(other)
    if not (row and theirs and all(map(os.path.exists, paths))):
        return
    made = os.path.getmtime(os.path.join(run, 'row.json'))
    newest = max(map(os.path.getmtime, paths))
    if theirs['condition'] in row['cka'] and made >= newest:
        return
    device, *_ = machine(device)
    states = []
    for path in paths:
        x = torch.from_numpy(np.load(path)).to(device)
        states.append(x.flatten(0, 1))                      # [rows * T, n_embd]
    row['cka'][theirs['condition']] = measures.cka(*states)
    with runs.locked(run):
        runs.write_json(os.path.join(run, 'row.json'), row)

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

    masks = rows.train, rows.test
    x_train, x_test = (rows.tokens[mask].cpu().numpy() for mask in masks)
    y_train, y_test = (rows.topics[mask].cpu().numpy() for mask in masks)
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
    states, sums, kept = pass_over(model, rows, desc, allowed)
    runs.write_array(os.path.join(cfg.run, 'states.npy'), kept[:STATE_ROWS])
    fresh = build(c, torch.Generator().manual_seed(c['seed'])).to(device)
    untrained, *_ = pass_over(fresh, rows, 'untrained')
    attention = attention_columns(model, fresh, sums, cfg.null_draws, c['seed'])
    bigram = bigram_references(rows, data.meta, allowed[0])

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
    shown = example(model, rows, attention['heads']['score_p'])
    runs.write_json(os.path.join(cfg.run, 'example.json'), shown)
    references = NO_REFERENCES | (data.meta.get('references') or {})
    seconds = {'train': records[-1]['seconds'], 'analysis': time.time() - clock}
    settings = {key: getattr(cfg, key) for key in SETTINGS}
    row = runs.columns(c) | attention | {
        'main': runs.is_main(cfg.run),
        'measures_version': measures.VERSION,
        **outcome(records[-1]['val_loss'], references),
        'orderedness': runs.orderedness(records, 'topics'),
        'orderedness_by_token': runs.orderedness(records, 'tokens'),
        'bigram': bigram,
        'cka': {},
        'probe': probe,
        'lens': lens,
        'curve': runs.curve(records),
        'settings': settings,
        **versions(device),
        'seconds': seconds,
        'config': c}
    runs.write_json(os.path.join(cfg.run, 'row.json'), row)
    middle = c['n_layer'] // 2
    P = runs.show(runs.plain(attention['mean']['score_p']), '.3f')
    print(f'{cfg.run}: val loss {row["val_loss"]:.4f}, P {P}, probe[{middle}] {probe["accuracy"][middle]:.3f}, '
          f'{seconds["analysis"]:.0f} s')

if __name__ == '__main__':
    command(main, __file__)
