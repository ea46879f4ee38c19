"""Exports as others open them: transformers, its tokenizers and TransformerLens, through the real script."""
import contextlib
import itertools
import os
import re
import shutil
import textwrap
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel

import runs
import shards
from model import Qwen3, causal_bias, load
from test_train import HERE, refuses, run, succeeds, two_runs

TEXT = 'Topics, 12 of them:  wide  spaces,\ttabs,\nnew lines, Zoë’s naïve 東京 🙂 tokens that don’t end '
ARMS = {'mha': ['--n_head=2'], 'gqa': ['--n_head=4', '--n_kv_head=2']}
README = open(f'{HERE}/README.md', encoding='utf-8').read()
CASES = list(itertools.product(ARMS, ('rope', 'drope')))

def text_dataset(folder):
    """A dataset of the README's own text and its tokenizer.json: a byte-level BPE."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([README], 400, show_progress=False)
    tokens = np.array(bpe.encode(README).ids)
    tokens = tokens[:len(tokens) // 33 * 33].reshape(-1, 33)
    topics = np.arange(len(tokens))[:, None] % 3 + np.zeros_like(tokens)
    shards.write(folder, dict(train=tokens, train_topics=topics, val=tokens[:16], val_topics=topics[:16]),
                 dict(vocab_size=400, block_size=32, n_topics=3))
    bpe.save(os.path.join(folder, 'tokenizer.json'))

def folder_of(arm, kind):
    return f'out/demo/{arm}_shuffled_{kind}/seed0'

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """Datasets in data, runs in out/demo, their exports in out/<arm>_<kind>, by the real stages."""
    home = tmp_path_factory.mktemp('home')
    with contextlib.chdir(home):
        for arm, flags in ARMS.items():
            text_dataset(f'data/{arm}')
            two_runs(f'data/{arm}', folder_of(arm, 'rope'), *flags)
        for arm, kind in CASES:
            succeeds(run('export_hf.py', f'--run={folder_of(arm, kind)}', f'--out_dir=out/{arm}_{kind}'))
    return home

def ours(home, arm, kind):
    """(the run's model, rows of token ids [3, 32])"""
    model = load(str(home / folder_of(arm, kind)))
    return model, torch.randint(0, 400, (3, 32), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('arm, kind', CASES)
def test_transformers_opens_it(home, arm, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer     # slow to import
    (model, idx), folder = ours(home, arm, kind), home / f'out/{arm}_{kind}'
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info                              # no key missing, unexpected, of another shape
    assert theirs.dtype == torch.float32 and theirs.config.head_dim == 8
    with torch.no_grad():
        a, b = model(idx), theirs(idx).logits
        model.rope = not model.rope
        assert a.std() > 0.5 and (a - b).abs().max() < 1e-5
        assert (model(idx) - b).abs().max() > 0.1                    # positions matter to these weights

    c = runs.read_json(folder / 'config.json')               # what transformers before 5 goes by says the same
    assert (c['rope_scaling'] or {'rope_type': 'default'}) | {'rope_theta': c['rope_theta']} == c['rope_parameters']
    assert (c['rope_scaling'] is None) == (kind == 'rope') and c['max_position_embeddings'] == 32

    bpe = Tokenizer.from_file(str(home / f'data/{arm}/tokenizer.json'))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, 'one<|endoftext|>two'):
        ids = tokenizer(text)['input_ids']
        assert ids == bpe.encode(text).ids and tokenizer.decode(ids) == text

def test_readme_opens_it_in_transformer_lens(home, monkeypatch):
    """The attention patterns that TransformerLens caches are those that analyze.py measures."""
    if not os.environ.get('REQUIRE_TRANSFORMER_LENS'):               # the Makefile requires it: a skip would hide it
        pytest.importorskip('transformer_lens', reason='needs TransformerLens: make test-transformer-lens')
    monkeypatch.chdir(home)
    section = README.split('\n## Open it elsewhere\n')[1].split('\n## ')[0]
    blocks = re.findall(r'(?:^    .*\n)+', section, re.M)
    (command,), (lines,) = ([b for b in blocks if word in b] for word in ('export_hf.py', 'TransformerBridge'))
    assert command.split()[2:] == [f'--run={folder_of("mha", "drope")}', '--out_dir=out/hf'] and "'out/hf'" in lines
    for arm, kind in CASES:
        exec(textwrap.dedent(lines).replace('out/hf', f'out/{arm}_{kind}'), names := {})
        theirs, (model, idx) = names['model'], ours(home, arm, kind)
        pattern = list(model.trace(torch.arange(20)[None]))[1][1]    # what the README's lines end with
        assert (names['pattern'] - pattern).abs().max() < 1e-5
        logits, cache = theirs.run_with_cache(idx)
        with torch.no_grad():
            assert (model(idx) - logits).abs().max() < 1e-5
        for layer, (_, a) in enumerate(list(model.trace(idx))[1:]):
            b = cache[f'blocks.{layer}.attn.hook_pattern']
            assert (a - b).abs().max() < 1e-5 and not b.triu(1).any() and a.std() > 0.01
        ids = Tokenizer.from_file(f'data/{arm}/tokenizer.json').encode(TEXT).ids
        assert theirs.to_tokens(TEXT)[0].tolist() == ids[:32]        # text enters as in the dataset, without a BOS

def test_bad_exports(home, tmp_path, monkeypatch):
    bad, data, out = tmp_path / 'run', tmp_path / 'data', tmp_path / 'out' / 'hf'
    shutil.copytree(home / folder_of('mha', 'rope'), bad)
    shutil.copytree(home / 'data/mha', data)
    config = runs.read_config(bad) | {'data_dir': str(data)}
    runs.write_json(f'{bad}/config.json', config)
    def says(*words):
        refuses(run('export_hf.py', f'--run={bad}', f'--out_dir={out}'), *words)
        assert not out.parent.exists() or not os.listdir(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(Qwen3, 'positions', lambda model, layer, T: (None, causal_bias(T)))
        says('other positions', 'cannot be exported')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', Mock(side_effect=OSError(28, 'No space left on device')))
        says('hf', 'No space left')
    large = Tokenizer(WordLevel({'a': 400})).to_str()
    for text, words in (('{"model": ', 'make the dataset again'), (large, 'only 400 tokens')):
        (data / 'tokenizer.json').write_text(text)
        says('data/tokenizer.json', words)
    runs.write_json(f'{bad}/config.json', config | {'n_topics': 9})
    says('wants another dataset', 'n_topics = 3 there, here 9')      # its tokenizer is not the run's
    shutil.rmtree(data)                                              # the data is gone: no tokenizer
    done = succeeds(run('export_hf.py', f'--run={bad}', f'--out_dir={out}'))
    assert 'mha_shuffled_rope as Qwen3, no tokenizer' in done.stdout
    assert sorted(os.listdir(out)) == ['config.json', 'model.safetensors']
