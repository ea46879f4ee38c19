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
import time
import zlib
from functools import reduce
from itertools import combinations
from os.path import exists, getmtime
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
lens_draws = 5              # label exchanges behind the chance level of that [2, 2**31)
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
    bigram, best = np.array([references['bigram'], references['filter']], float)     # NaN where there is none
    gap = bigram - best
    return {
        'val_loss': val_loss,
        'references': references,
        'excess': val_loss - best,
        'gap_closed': (bigram - val_loss) / gap if gap > 0.01 else None}

# -----------------------------------------------------------------------------
# rows and patterns

def first_rows(data, n, device):
    """Tokens [n, T + 1] and topics [n, T] of the first validation rows, int64 on the device."""
    tokens, topics = (torch.tensor(x[:n].astype(int), device=device) for x in (data.val, data.val_topics))
    return tokens, topics[:, :-1]

def validation_rows(cfg, c, data, device):
    """
    The rows that are looked at, in equal groups: tokens and topics [n, T]; masks, bool [2, n, T]: the tokens that
    train the probes, and those of other rows that test them; batches: row numbers, as many of each group and as many
    as memory takes the patterns of.
    """
    T = c['block_size']
    n = min(cfg.analysis_rows, len(data.val)) // GROUPS * GROUPS
    if not n:
        raise SystemExit(f'analyze.py: {len(data.val)} validation rows; at least {GROUPS} are needed')
    tokens, topics = first_rows(data, n, device)
    generator = torch.Generator().manual_seed(c['seed'])
    memory = 4 << 30 if device.type == 'cuda' else 256 << 20
    size = GROUPS * max(1, memory // (GROUPS * c['n_head'] * T * T * 40))      # patterns in fp64, several copies
    return SimpleNamespace(
        tokens=tokens[:, :-1],
        topics=topics,
        masks=measures.probe_tokens(n, T, cfg.probe_tokens, generator),
        batches=torch.arange(n).split(size))

def pass_over(model, rows, allowed=None, causal=True):
    """
    One pass over the rows. Returns the hidden states at the probes' tokens, [L + 1][train, test] of [n, n_embd];
    the attention sums of each layer, of each group of rows [L][GROUPS], where the keys that each layer allows, [L] of
    [T, T], are given; and the states of the middle layer, fp16 [n, T, n_embd].
    """
    n_layer = len(model.model.layers)
    states = [[] for _ in range(n_layer + 1)]
    sums = [[None] * GROUPS for _ in range(n_layer)]
    middle = []
    for b in progress(rows.batches, desc='analyse', leave=False):
        for depth, (hidden, pattern) in enumerate(model.trace(rows.tokens[b], causal)):
            states[depth].append([hidden[mask] for mask in rows.masks[:, b]])
            if depth == n_layer // 2:
                middle.append(hidden.half().cpu())
            if allowed and depth:
                groups = sums[depth - 1]
                for g in range(GROUPS):
                    z = rows.topics[b[g::GROUPS]]
                    part = measures.attention_sums(pattern[g::GROUPS], z, allowed[depth - 1])
                    groups[g] = measures.add(groups[g], part)
    joined = []
    for parts in states:
        joined.append([torch.cat(split) for split in zip(*parts)])
    return joined, sums, torch.cat(middle)

def scores(sums, which):
    """P and excess mass of every head [2, L, H] on some of the groups of rows; sums: of each layer and group."""
    found = []
    for groups in sums:
        whole = reduce(measures.add, [groups[g] for g in which])
        found.append(torch.stack(measures.score_p(whole)))
    return torch.stack(found, 1)[:, :, :-1]                 # the last head is uniform attention

def row_errors(sums):
    """
    Standard error over rows of P and of excess mass [2, L, H], by the jackknife that leaves out a group at a time
    (Efron & Tibshirani 1993, eq. 11.5).
    """
    without = [scores(sums, which) for which in combinations(range(GROUPS), GROUPS - 1)]
    spread = torch.stack(without).std(0, correction=0)
    return spread * (GROUPS - 1) ** 0.5

def head_table(sums, draws, seed):
    """
    Every measure of every head, {name: [L, H]}, and its level in uniform attention, {name: number}, from the sums of
    each layer and group; the same null draws for all of them.
    """
    layers = [measures.head_measures(reduce(measures.add, groups), draws, seed) for groups in sums]
    heads, uniform = {}, {}
    for name in layers[0]:
        table = torch.stack([layer[name] for layer in layers])
        heads[name] = table[:, :-1]
        uniform[name] = table[:, -1].mean()
    return heads, uniform

def unmasked(run, model, rows):
    """What the log's own analysis saw, attention without the causal mask, beside uniform; into unmasked.json."""
    keys = torch.ones_like(model.allowed(0, rows.tokens.size(1)))
    _, sums, _ = pass_over(model, rows, [keys] * len(model.model.layers), causal=False)
    heads, uniform = head_table(sums, draws=1, seed=0)
    names = 'entropy', 'within_all'
    found = {
        'causal': False,
        'mean': {name: heads[name].mean() for name in names},
        'uniform': {name: uniform[name] for name in names}}
    runs.write_json(f'{run}/unmasked.json', found)
    print(f'{run}/unmasked.json: {runs.plain(found)}')

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
    heads, uniform = head_table(sums, draws, seed)
    heads |= ranks(model)
    init_rank = {name: x.mean(1) for name, x in ranks(fresh).items()}          # [L]
    uniform |= {name: x.mean() for name, x in init_rank.items()}
    halves = [scores(sums, range(half, GROUPS, 2))[0] for half in (0, 1)]      # P on even and on odd rows, [L, H]
    return {
        'mean': {name: x.nanmean() for name, x in heads.items()},
        'uniform': uniform,
        'heads': heads,
        'reliability': measures.reliability(torch.stack(halves)),
        'errors': dict(zip(('score_p', 'excess_mass'), row_errors(sums))),
        'init_rank': init_rank}

def example(model, rows, score):
    """
    The most topical head, by P [L, H], on the first row with most runs: its pattern as a picture in JSON,
    max-pooled to at most 256 a side, a byte a cell, zlib, base64.
    """
    row = measures.runs(rows.topics)[1].argmax()
    layer, head = torch.unravel_index(score.nan_to_num().argmax(), score.shape)
    _, pattern = list(model.trace(rows.tokens[row][None]))[layer + 1]          # [1, H, T, T]
    pool = -(-pattern.size(2) // 256)
    small = F.max_pool2d(pattern[:, head], pool, ceil_mode=True)[0]
    cells = (small / small.max() * 255).round().byte()                         # [T / pool, T / pool]
    deflated = zlib.compress(cells.cpu().numpy(), 9)
    return {
        'layer': layer,
        'head': head,
        'score_p': score[layer, head],
        'topics': rows.topics[row, ::pool],
        'uint8': base64.b64encode(deflated).decode()}

# -----------------------------------------------------------------------------
# what else the rows, and other runs, are compared with

def bigrams(meta, tokens):
    """
    The bigram that ends at each of the tokens [n, T], as a number: of tokens, or of groups in a group chain. And what
    it says of the topic, P(z | bigram) [n, T, K]; None where no chain made the data. Token 0 stands before the first.
    """
    tokens = F.pad(tokens, (1, 0))
    code, belief = tokens, None
    if meta.get('kind') == 'synthetic':
        P, _, row_of, *_ = data_synth.make_chains(SimpleNamespace(**meta), tokens.device)
        code = row_of[tokens]
        prior = data_synth.topic_given_token(P, row_of)[tokens[:, :-1].T]      # [T, n, K]
        joint = prior * data_synth.likelihood(tokens, P, row_of)
        belief = F.normalize(joint, 1, 2).transpose(0, 1)
    return code[:, :-1] * meta['vocab_size'] + code[:, 1:], belief

def bigram_references(rows, meta, keys):
    """
    P and O of two heads that know one bigram at each end, on these rows and allowed keys [T, T]: {name: {'score_p',
    'score_o'}}. `equal` looks at all keys with the query's bigram alike, at all keys where none has it; `posterior`,
    where a chain made the data, at each by the chance that it shares the query's topic, sum_z P(z | bigram of t) P(z |
    bigram of s). Both look at far keys alone, as P and O do: others would take what mass they have.
    """
    bigram, belief = bigrams(meta, rows.tokens)
    far = keys.tril(-measures.MIN_DISTANCE)
    sums = None
    for b in rows.batches:
        weights = [measures.equal_pairs(bigram[b])]
        if belief is not None:
            weights.append(belief[b] @ belief[b].mT)
        A = (torch.stack(weights, 1).double() + 1e-9) * far                    # [B, 1 or 2, T, T]
        A = F.normalize(A, 1, -1)                           # stays 0 at the first queries, which have no far keys
        sums = measures.add(sums, measures.attention_sums(A, rows.topics[b], keys))
    P, _ = measures.score_p(sums)
    O = measures.score_o(measures.other_blocks(sums))
    heads = zip(('equal', 'posterior'), P[:-1], O)          # the last is uniform attention
    return {name: {'score_p': p, 'score_o': o} for name, p, o in heads}

def compare_states(run, other, device):
    """CKA of the middle layer's states in two run folders that have rows, into the row of the first; nothing where one
    has no states, or where they are no newer than that."""
    path = f'{run}/row.json'
    states = [f'{folder}/states.npy' for folder in (run, other)]
    row = runs.read_row(run)
    name = runs.read_row(other)['condition']
    if not all(map(exists, states)):
        return
    newest = max(path, *states, key=getmtime)
    if name in row['cka'] and newest == path:
        return
    device, *_ = machine(device)
    X, Y = (torch.from_numpy(np.load(file)).flatten(0, 1).to(device) for file in states)       # [rows * T, n_embd]
    row['cka'][name] = measures.cka(X, Y)
    with runs.locked(run):
        runs.write_row(run, row)

# -----------------------------------------------------------------------------
# probes

def split(rows, x):
    """x [n, T, ...] at the probes' tokens: those to train on, those to test on."""
    return [x[mask] for mask in rows.masks]

def named_rightly(states, labels):
    """Which test tokens a probe at each depth names rightly, bool [depths, n]; labels: [train, test]."""
    guesses = [measures.probe(train, labels[0], test) for train, test in states]
    return (torch.stack(guesses) == labels[1]).cpu().numpy()

def probe_table(c, rows, states, untrained, embedded, posterior):
    """
    Accuracy of the topic probe by depth, beside what else would name topics: the most frequent one, tokens
    alone, the mean of the last embeddings [n, T, n_embd], the untrained model, the Bayes filter's posterior [rows,
    T + 1, K]; and what a probe can remember, a random fixed label for each token type. After the last layer by
    distance from a boundary, too.
    """
    tokens = split(rows, rows.tokens)
    topics = split(rows, rows.topics)
    labels = measures.control_labels(c['vocab_size'], c['n_topics'], c['seed'])
    control = [labels.to(x.device)[x] for x in tokens]
    running = split(rows, measures.running_mean(embedded))
    right = named_rightly(states, topics)
    references = {
        'untrained': named_rightly(untrained, topics).mean(1),
        'control': named_rightly(states, control).mean(1),
        'running_mean': named_rightly([running], topics).mean(),
        'majority': measures.majority(*topics),
        'token': measures.token_identity(*tokens, *topics, c['vocab_size'], c['n_topics'])}

    _, test = rows.masks
    distance = measures.distance_from_boundary(rows.topics).cpu()[test]
    by_distance = {
        'distance': measures.BINS,
        'accuracy': measures.by_distance(right[-1], distance)}
    if posterior is not None:
        belief = posterior[:len(test), :-1][test]
        best = belief.argmax(-1) == topics[1].cpu().numpy()
        references['ceiling'] = best.mean()
        by_distance['ceiling'] = measures.by_distance(best, distance)
    return {
        'accuracy': right.mean(1),
        'references': references,
        'by_distance': by_distance}

# -----------------------------------------------------------------------------

def main(cfg):
    runs.read_config(cfg.run)                               # stops where there is no run
    with memory_errors('analyse on a device with more of it, such as --device=cpu'), runs.locked(cfg.run):
        analyse(cfg)

@torch.no_grad()
def analyse(cfg):
    clock = time.time()
    c, model, data, device = open_finished(cfg.run, cfg.device)
    records = runs.read_log(cfg.run)
    if not records or records[-1]['val_loss'] is None:
        raise SystemExit(f'{cfg.run}/log.jsonl: its last line is gone; delete the folder and train again')
    rows = validation_rows(cfg, c, data, device)
    if not cfg.causal:
        return unmasked(cfg.run, model, rows)

    # ---- the model, and the same untrained, over the rows
    allowed = [model.allowed(layer, c['block_size']) for layer in range(c['n_layer'])]
    states, sums, kept = pass_over(model, rows, allowed)
    runs.write_array(f'{cfg.run}/states.npy', kept[:STATE_ROWS])
    fresh = build(c).to(device)
    untrained, *_ = pass_over(fresh, rows)
    attention = attention_columns(model, fresh, sums, cfg.null_draws, c['seed'])

    # ---- probes, and the operator by topic
    embedded = model.model.embed_tokens(rows.tokens)
    probe = probe_table(c, rows, states, untrained, embedded, data.val_posterior)
    first = first_rows(data, cfg.lens_rows, device)
    lens = tensor_lens.own_topic_shares(model, *first, c['n_topics'], cfg.lens_draws, c['seed'])

    # ---- the row comes last: it says that all is done
    shown = example(model, rows, attention['heads']['score_p'])
    runs.write_json(f'{cfg.run}/example.json', shown)
    references = NO_REFERENCES | data.meta.get('references', {})
    row = runs.write_row(cfg.run, runs.columns(c) | attention | {
        'main': runs.is_main(cfg.run),
        'measures_version': measures.VERSION,
        **outcome(records[-1]['val_loss'], references),
        'orderedness': runs.orderedness(records, 'topics'),
        'orderedness_by_token': runs.orderedness(records, 'tokens'),
        'bigram': bigram_references(rows, data.meta, allowed[0]),
        'cka': {},
        'probe': probe,
        'lens': lens,
        'curve': runs.curve(records),
        'settings': {key: getattr(cfg, key) for key in SETTINGS},
        **versions(device),
        'seconds': {'train': records[-1]['seconds'], 'analysis': time.time() - clock},
        'config': c})
    middle = c['n_layer'] // 2
    print(f'{cfg.run}: val loss {row["val_loss"]:.4f}, P {runs.show(row["mean"]["score_p"], ".3f")}, '
          f'probe[{middle}] {row["probe"]["accuracy"][middle]:.3f}, {row["seconds"]["analysis"]:.0f} s')

if __name__ == '__main__':
    command(main, __file__)
