"""
Continue a prompt with a trained run whose dataset has a tokenizer.

Reads a run folder and the tokenizer.json of its dataset. Writes nothing: it prints the continuations.

    python sample.py --run=out/wiki_small/mha_shuffled_rope/seed0 --prompt="The river flows through"
    python sample.py --run=out/wiki_small/mha_shuffled_drope/seed0 --temperature=0 --n_samples=1
"""
from os.path import exists

import torch

from configurator import command
from train import open_finished

# -----------------------------------------------------------------------------
# config

run = ''                    # folder of the run
prompt = 'The city of'      # text to continue
n_samples = 3               # continuations [1, 2**31)
n_tokens = 60               # tokens in each [1, 2**31)
temperature = 0.8           # 0 = always the likeliest token [0, inf)
top_k = 100                 # of the likeliest tokens, at most [1, 2**31)
seed = 0                    # of the draws [0, 2**63)
device = ''                 # cpu, cuda, cuda:1; '' = cuda where there is one

# -----------------------------------------------------------------------------

@torch.no_grad()
def continuation(model, ids, n_tokens, temperature, top_k, generator):
    """ids, a list of tokens, and n_tokens drawn after it; the model sees the last block_size of them."""
    for _ in range(n_tokens):
        window = torch.tensor([ids[-model.block_size:]], device=model.cos.device)
        logits = model(window)[0, -1].float().cpu()         # [vocab_size]
        best, which = logits.topk(min(top_k, len(logits)))
        if temperature == 0:
            pick = 0
        else:
            weights = ((best - best[0]) / temperature).softmax(0)          # best[0] is the largest
            pick = torch.multinomial(weights, 1, generator=generator)
        ids = ids + [int(which[pick])]
    return ids

def main(cfg):
    """Prints the continuations."""
    _, model, data, _ = open_finished(cfg.run, cfg.device)
    path = f'{data.folder}/tokenizer.json'
    if not exists(path):
        raise SystemExit(f'{path}: missing; only runs on text (prepare_wiki.py) can be sampled')
    from tokenizers import Tokenizer                        # only here
    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode(cfg.prompt.encode('utf-8', 'replace').decode()).ids     # a shell may give stray bytes
    if not ids:
        raise SystemExit('prompt is empty; give a few words with --prompt="..."')
    generator = torch.Generator().manual_seed(cfg.seed)
    for i in range(cfg.n_samples):
        tokens = continuation(model, ids, cfg.n_tokens, cfg.temperature, cfg.top_k, generator)
        print(f'--- {i + 1}\n{tokenizer.decode(tokens)}\n')

if __name__ == '__main__':
    command(main, __file__)
