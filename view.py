"""
Look inside: one page a run, a file that opens anywhere, offline, in any browser of 2024 or later.

    python view.py --run=out/demo/mha_shuffled_rope/seed0 --other=out/demo/mha_shuffled_drope/seed0
    python view.py --run=out/demo/mha_shuffled_rope/seed0 --view_rows=0

Reads one or two run folders and their dataset. Writes view.html into the folder of the run: validation rows token by
token, every head's attention on them, P, the loss beside the Bayes filter's, the tensor lens's split by topic; of two
runs side by side where --other names one.
How the page looks and what its keys do is in view_template.html; here is what it knows.

Attention takes a byte a weight: of the query's largest weight 1, 3, 5, ... or 255 parts in 255, whichever is nearest,
and 0 where it is 0, as for a key that the layer does not allow. Sums over keys are taken here, of the true weights.
"""
import base64
import json
import zlib
from os.path import exists, getsize
from types import SimpleNamespace

import torch

import data_synth
import runs
from configurator import command, source
from tensor_lens import topic_parts
from train import open_finished

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run; the page goes there
other = ''                  # folder of a run to put beside it, such as the same one after DroPE; '' = none
view_rows = (0, 1)          # validation rows to choose from [0, 2**31)

# -----------------------------------------------------------------------------
# the rows

def texts(folder, ids):
    """Tokens as one reads them: text where the dataset has a tokenizer, else their ids."""
    path = f'{folder}/tokenizer.json'
    if not exists(path):
        return [str(i) for i in ids]
    from tokenizers import Tokenizer                        # only here
    tokenizer = Tokenizer.from_file(path)
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids]

def filter_losses(meta, tokens):
    """What the Bayes filter loses at each token but the first of rows [n, T + 1]: nats [n, T]; None where no chain
    made them."""
    if meta.get('kind') != 'synthetic':
        return None
    made = SimpleNamespace(**meta)
    P, _, row_of, *_ = data_synth.make_chains(made, 'cpu')
    likelihood = data_synth.likelihood(tokens, P, row_of)
    expected, _ = data_synth.bayes_filter(likelihood, data_synth.val_hazard(made, 'cpu'), made.repeats)
    return -expected.T.log()

# -----------------------------------------------------------------------------
# a run on a row

def pack(x):
    """The bytes of a tensor, deflated, in base64: the page unpacks what is looked at."""
    deflate = zlib.compressobj(9, strategy=zlib.Z_FILTERED)                  # a seventh less here than by default
    return base64.b64encode(deflate.compress(x.numpy()) + deflate.flush()).decode()

@torch.no_grad()
def row_of_run(c, model, tokens, topics):
    """
    A run on a row, tokens and topics [T + 1]: {'loss', 'layers'}, nats at each token but the first [T], and of each
    layer `attention` [H, T (T + 1) / 2], bytes as above, and `numbers` [2 H + 2, T] in fp32: of each head and query the
    largest weight, and the share of all its weight on keys of its topic; of the state after the layer the share that
    the token itself made, and that all tokens of its topic made (tensor_lens.py).
    """
    idx, z = tokens[None, :-1], topics[:-1]
    T = len(z)
    query, key = torch.tril_indices(T, T)
    same = z[:, None] == z
    depths = zip(model.trace(idx), topic_parts(model, idx, z[None, :, None], c['n_topics']))
    next(depths)                                            # the embedding
    layers = []
    for (_, pattern), (hidden, parts, own) in depths:
        A = pattern[0]                                      # [H, T, T]
        largest = A.amax(-1).half().float()                 # as the page will have it
        mine = parts[0, torch.arange(T), 0, z]              # [T, n_embd]
        made = torch.stack([own[0], mine]) * hidden
        numbers = torch.cat([
            largest,
            (A * same).sum(-1),
            made.sum(-1) / hidden.pow(2).sum(-1)])
        odd = 1 + 2 * (A / largest[..., None] * 127.5).floor()
        layers.append({
            'attention': pack((odd * (A > 0)).byte()[:, query, key]),
            'numbers': pack(numbers.half().float())})       # of 11 bits, then zeros: those deflate
    return {'loss': model(idx, tokens[None, 1:])[0], 'layers': layers}

# -----------------------------------------------------------------------------

def main(cfg):
    """Writes the page."""
    folders = [cfg.run, cfg.other] if cfg.other else [cfg.run]
    opened = [open_finished(folder, 'cpu') for folder in folders]            # a few rows: no need of a GPU
    shapes = {(c['n_layer'], c['n_head'], data.val.tobytes()) for c, _, data, _ in opened}
    if len(shapes) > 1:
        raise SystemExit(f'{cfg.other}: has other layers, heads or validation rows than {cfg.run}; choose one like it')
    data = opened[0][2]                                     # the same in both
    numbers = list(cfg.view_rows)
    if max(numbers) >= len(data.val):
        raise SystemExit(f'view_rows = {cfg.view_rows}: the last validation row is {len(data.val) - 1}')
    tokens, topics = (torch.from_numpy(x[numbers].astype(int)) for x in (data.val, data.val_topics))

    shown = []
    for folder, (c, model, *_) in zip(folders, opened):
        row = runs.read_row(folder) or runs.row_of_log(folder)
        shown.append({
            **runs.columns(c),
            'val_loss': row['val_loss'],
            'heads': row.get('heads'),                      # its measures; null where it is not analysed yet
            'rows': [row_of_run(c, model, x, z) for x, z in zip(tokens, topics)]})
    page = runs.plain({
        'numbers': numbers,
        'tokens': [texts(data.folder, ids) for ids in tokens.tolist()],
        'topics': topics,
        'filter': filter_losses(data.meta, tokens),
        'runs': shown})
    text = json.dumps(page).replace('<', '\\u003c')         # no token ends the script element
    path = f'{cfg.run}/view.html'
    runs.write_text(path, source('view_template.html').replace('{{page}}', text))
    print(f'{path}: {getsize(path) / 1e6:.1f} MB; open it in a browser')

if __name__ == '__main__':
    command(main, __file__)
