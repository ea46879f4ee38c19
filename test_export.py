"""Exports as others open them: transformers, its tokenizers and TransformerLens, through the real script."""
import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import drope
import export_hf
import shards
import train
from configurator import configure
from model import load, rotary
from test_smoke import refuses
from test_train import HERE, TINY, run

TEXT = 'Topics, 12 of them:  wide  spaces,\ttabs,\nnew lines, Zoë’s naïve 東京 🙂 tokens that don’t end '
ARMS = {'mha': ['--n_head=2'], 'gqa': ['--n_head=4', '--n_kv_head=2']}
SPECIAL = {'mha': ['<|pad|>', '<|endoftext|>'], 'gqa': []}           # of their datasets' tokenizers
CASES = list(itertools.product(ARMS, ('rope', 'drope')))

def text_dataset(folder, special_tokens):
    """A dataset of the README's own text and its tokenizer.json: a byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = open(os.path.join(HERE, 'README.md'), encoding='utf-8').read()
    bpe.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokens = np.array(bpe.encode(text).ids)
    tokens = tokens[:len(tokens) // 33 * 33].reshape(-1, 33)
    topics = np.arange(len(tokens))[:, None] % 3 + np.zeros_like(tokens)
    shards.write(folder, dict(train=tokens, train_topics=topics, val=tokens[:16], val_topics=topics[:16]),
                 dict(vocab_size=400, block_size=32, n_topics=3))
    bpe.save(os.path.join(folder, 'tokenizer.json'))

def folder_of(arm, kind):
    return f'out/demo/{arm}_shuffled_{kind}/seed0'

def export(home, *args):
    done = run(os.path.join(HERE, 'export_hf.py'), *args, cwd=home)
    assert done.returncode == 0, done.stderr

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """
    A folder with datasets in data, runs in out/demo, and their exports out/<arm>_<kind>, all made by the real stages.
    Before the export every weight of the checkpoints, norm gains too, is drawn at random and large enough to matter.
    """
    home = tmp_path_factory.mktemp('home')
    for arm, tokens in SPECIAL.items():
        text_dataset(str(home / 'data' / arm), tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                         # these are too small for more
    with contextlib.chdir(home):
        for arm, flags in ARMS.items():
            flags = [*TINY, *flags, f'--data_dir=data/{arm}', '--out_dir=out/demo', '--max_iters=4']
            train.main(configure('train.py', flags))
            drope.main(configure('drope.py', [f'--run={folder_of(arm, "rope")}', '--recal_iters=2', '--device=cpu']))
    for arm, kind in CASES:
        path, g = home / folder_of(arm, kind) / 'ckpt.pt', torch.Generator().manual_seed(len(kind))
        ckpt = torch.load(path, weights_only=True)
        for p in ckpt['model'].values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.ndim == 1))
        torch.save(ckpt, path)
        export(home, f'--run={folder_of(arm, kind)}', f'--out_dir=out/{arm}_{kind}')
    torch.set_num_threads(threads)
    return home

def ours(home, arm, kind):
    """(the run's model, rows of token ids [3, 32])"""
    model = load(str(home / folder_of(arm, kind)))
    vocab_size = model.model.embed_tokens.num_embeddings
    return model, torch.randint(0, vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))

# -----------------------------------------------------------------------------
# transformers

@pytest.mark.parametrize('arm, kind', CASES)
def test_logits_equal_transformers(home, arm, kind):
    from transformers import AutoModelForCausalLM                    # slow to import
    model, idx = ours(home, arm, kind)
    folder = home / f'out/{arm}_{kind}'
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info                              # no key missing, unexpected, of another shape
    assert theirs.dtype == torch.float32 and theirs.config.head_dim == 8
    with torch.no_grad():
        a, b = model(idx), theirs(idx).logits
        model.rope = not model.rope
        print(f'{arm} {kind}: logits differ by {(a - b).abs().max():.1e}, sd {a.std():.2f}')
        assert a.std() > 0.5 and (a - b).abs().max() < 1e-5
        assert (model(idx) - b).abs().max() > 0.1                    # positions matter to these weights

@pytest.mark.parametrize('theta', (1e6, 1e4))
def test_angles_equal_transformers_at_length(theta):
    """A rounding of the frequencies grows with the position: at 512 it would cost more than 1e-5 in the logits."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    c = dict(rope=True, vocab_size=8, block_size=512, n_layer=1, n_embd=64, mlp_hidden=8, n_head=1, n_kv_head=1,
             head_dim=64, rope_theta=theta)
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**export_hf.qwen3_config(c)))
    cos, sin = theirs(torch.zeros(1), torch.arange(512)[None])
    ours = rotary(512, 64, theta)
    assert (ours[0] - cos[0]).abs().max() < 1e-6 and (ours[1][:, 32:] - sin[0, :, 32:]).abs().max() < 1e-6

@pytest.mark.parametrize('arm, kind', CASES)
def test_what_is_in_the_folder(home, arm, kind):
    folder, model = home / f'out/{arm}_{kind}', ours(home, arm, kind)[0]
    files = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    assert sorted(os.listdir(folder)) == files
    weights, c = load_file(folder / 'model.safetensors'), json.load(open(folder / 'config.json'))
    assert weights.keys() == model.state_dict().keys() and 'lm_head.weight' not in weights
    assert all(w.dtype == torch.float32 and torch.equal(w, model.state_dict()[k]) for k, w in weights.items())
    assert c['architectures'] == ['Qwen3ForCausalLM'] and c['tie_word_embeddings'] is True
    assert c['num_key_value_heads'] == 2 and c['max_position_embeddings'] == 32 and c['rope_theta'] == 1e6
    # what transformers before 5 goes by says the same
    assert (c['rope_scaling'] or {'rope_type': 'default'}) | {'rope_theta': 1e6} == c['rope_parameters']
    assert (c['rope_scaling'] is None) == (kind == 'rope')

@pytest.mark.parametrize('arm', ARMS)
def test_tokenizer_round_trip(home, arm):
    from transformers import AutoConfig, AutoTokenizer
    bpe = Tokenizer.from_file(str(home / f'data/{arm}/tokenizer.json'))
    theirs, config = (auto.from_pretrained(home / f'out/{arm}_drope') for auto in (AutoTokenizer, AutoConfig))
    for text in (TEXT, open(os.path.join(HERE, 'README.md'), encoding='utf-8').read(), 'one<|endoftext|>two'):
        ids = theirs(text)['input_ids']
        assert ids == bpe.encode(text).ids and theirs.decode(ids) == text
    assert len(theirs) == 400 and theirs.model_max_length == 32
    expected = (0, 1, None) if SPECIAL[arm] else (None, None, None)
    for has in (theirs, config):
        assert (has.pad_token_id, has.eos_token_id, has.bos_token_id) == expected

# -----------------------------------------------------------------------------
# TransformerLens, by the README's own lines

def readme():
    """(the arguments of the export command, the lines that open the export) of the README's section."""
    section = open(os.path.join(HERE, 'README.md')).read().split('\n## Open it elsewhere\n')[1].split('\n## ')[0]
    blocks = re.findall(r'(?:^    .*\n)+', section, re.M)
    (command,), (lines,) = ([b for b in blocks if word in b] for word in ('export_hf.py', 'TransformerBridge'))
    return command.split()[2:], textwrap.dedent(lines)

def test_readme_opens_it_in_transformer_lens(home, monkeypatch):
    """The attention patterns that TransformerLens caches are those that analyze.py measures."""
    if not os.environ.get('REQUIRE_TRANSFORMER_LENS'):               # .ci/run requires it: a skip would hide it
        pytest.importorskip('transformer_lens', reason='needs TransformerLens: make test-transformer-lens')
    monkeypatch.chdir(home)
    args, lines = readme()
    assert args == [f'--run={folder_of("mha", "drope")}', '--out_dir=out/hf']
    export(home, *args)
    exports = {'out/hf': ('mha', 'drope'), **{f'out/{arm}_{kind}': (arm, kind) for arm, kind in CASES}}
    for folder, (arm, kind) in exports.items():
        assert "'out/hf'" in lines
        exec(lines.replace('out/hf', folder), names := {})           # the first time to the letter
        theirs, (model, idx) = names['model'], ours(home, arm, kind)
        pattern = list(model.trace(torch.arange(20)[None]))[1][1]    # what the README's lines end with
        assert (names['pattern'] - pattern).abs().max() < 1e-5
        logits, cache = theirs.run_with_cache(idx)
        patterns = [p for _, p in model.trace(idx) if p is not None]
        with torch.no_grad():
            assert (model(idx) - logits).abs().max() < 1e-5
        model.rope = not model.rope
        others = [p for _, p in model.trace(idx) if p is not None]
        for layer, (a, other) in enumerate(zip(patterns, others, strict=True)):
            b = cache[f'blocks.{layer}.attn.hook_pattern']
            print(f'{arm} {kind}, layer {layer}: patterns differ by {(a - b).abs().max():.1e}, sd {a.std():.2f}')
            assert (a - b).abs().max() < 1e-5 and not b.triu(1).any()
            assert (a - other).abs().max() > 0.1                     # positions matter to these patterns
        ids = Tokenizer.from_file(f'data/{arm}/tokenizer.json').encode(TEXT).ids
        assert theirs.to_tokens(TEXT)[0].tolist() == ids[:32]        # text enters as in the dataset, without a BOS

# -----------------------------------------------------------------------------
# bad input: one line, and nothing is left behind

def test_bad_exports(home, tmp_path, monkeypatch):
    good, bad, out = str(home / folder_of('mha', 'rope')), str(tmp_path / 'run'), tmp_path / 'out' / 'hf'
    monkeypatch.chdir(home)                                          # data_dir of the run is relative
    shutil.copytree(good, bad)
    def says(*words, run=bad, out=out):
        with pytest.raises(SystemExit) as stop:
            export_hf.main(SimpleNamespace(run=str(run), out_dir=str(out)))
        line = str(stop.value)
        assert '\n' not in line and all(w in line for w in words), line
        assert not (tmp_path / 'out').exists() or not os.listdir(tmp_path / 'out')
    says('--run=', run='')
    says('--out_dir=', out='')
    says('none', 'no run here', run=tmp_path / 'none')
    (tmp_path / 'file').write_text('mine')
    says('file/hf', 'cannot be written', out=tmp_path / 'file/hf')
    says('file', 'is there already', out=tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'mine'
    config, ckpt = json.load(open(f'{bad}/config.json')), torch.load(f'{bad}/ckpt.pt', weights_only=True)

    torch.save({**ckpt, 'step': 2}, f'{bad}/ckpt.pt')
    says('stopped at step 2 of 4', 'finish it')
    torch.save({**ckpt, 'model': {'model.norm.weight': torch.zeros(3)}}, f'{bad}/ckpt.pt')
    says('ckpt.pt', 'another model')
    open(f'{bad}/ckpt.pt', 'wb').write(open(f'{good}/ckpt.pt', 'rb').read()[:1000])
    says('ckpt.pt', 'not a readable checkpoint')
    os.remove(f'{bad}/ckpt.pt')
    says('ckpt.pt', 'no checkpoint')
    open(f'{bad}/config.json', 'w').write('{"n_layer": ')
    says('config.json', 'not JSON')

    # a tokenizer that is broken, or too large
    shutil.copy(f'{good}/ckpt.pt', bad)
    shutil.copytree('data/mha', tmp_path / 'data')
    config['data_dir'] = str(tmp_path / 'data')
    json.dump(config, open(f'{bad}/config.json', 'w'))
    tokenizer = json.load(open('data/mha/tokenizer.json'))
    for text in ('{"model": ', '[]', '{"model": {"vocab": {}}, "added_tokens": []}'):
        (tmp_path / 'data/tokenizer.json').write_text(text)
        says('data/tokenizer.json', 'not a BPE')
    tokenizer['added_tokens'].append({'id': 400, 'content': '<|eos|>', 'special': True})
    (tmp_path / 'data/tokenizer.json').write_text(json.dumps(tokenizer))
    says('data/tokenizer.json', '400 tokens')

    # a disk that fills up, and then has room
    os.remove(tmp_path / 'data/tokenizer.json')
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'write_json', full)
        says('hf', 'No space left')
    export_hf.main(SimpleNamespace(run=bad, out_dir=str(out)))       # a dataset without a tokenizer
    assert sorted(os.listdir(out)) == ['config.json', 'model.safetensors']
    refuses(run('export_hf.py', f'--run={bad}', f'--out_dir={out}'), str(out), 'is there already')
    assert os.listdir(tmp_path / 'out') == ['hf']
    refuses(run('export_hf.py', f'--run={tmp_path}/none', f'--out_dir={tmp_path}/new'), 'none', 'no run here')
