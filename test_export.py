"""Runs as others open them: transformers, its tokenizers and TransformerLens; and the page of a run in Chromium."""
import contextlib
import html
import itertools
import os
import re
import shutil
import subprocess
import textwrap
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel

import runs
import shards
import view
from configurator import source
from model import Qwen3, causal_bias, load
from tensor_lens import topic_parts
from test_train import refuses, run, succeeds, two_runs

TEXT = 'Topics, 12 of them:  wide  spaces,\ttabs,\nnew lines, Zoë’s naïve 東京 🙂 tokens that don’t end '
ARMS = {'mha': ['--n_head=2'], 'gqa': ['--n_head=4', '--n_kv_head=2']}
README = source('README.md')
CASES = list(itertools.product(ARMS, ('rope', 'drope')))
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
GROUP = ['--chain=group', '--n_groups=4', '--vocab_size=16', '--n_topics=3', '--block_size=48', '--min_segment_len=9',
         '--repeats=False', '--train_rows=60', '--val_rows=6', '--data_dir=data/group']
WORDS = ['<script>alert(1)</script>', '</script>', '<!--', '<img src=x>', '&lt;', '"', '\\u003c', ' 東京', '\n', '$&']
GROUPS, TEXTS = ([f'out/{name}/mha_shuffled_{kind}/seed0' for kind in ('rope', 'drope')] for name in ('group', 'text'))

def text_dataset(folder, tokenizer, ids, T):
    """A dataset of token ids, in rows of T + 1, and their tokenizer.json."""
    rows = ids[:len(ids) // (T + 1) * (T + 1)].reshape(-1, T + 1)
    arrays = dict(train=rows, train_topics=rows % 3, val=rows[:16], val_topics=rows[:16] % 3)
    shards.write(folder, arrays, dict(vocab_size=tokenizer.get_vocab_size(), block_size=T, n_topics=3))
    tokenizer.save(f'{folder}/tokenizer.json')

def folder_of(arm, kind):
    return f'out/demo/{arm}_shuffled_{kind}/seed0'

@pytest.fixture(scope='module', autouse=True)
def home(tmp_path_factory):
    """A folder in which the tests here stay: datasets in data, runs with RoPE and without in out, by the real stages,
    with weights that matter, exports of those of out/demo in out/<arm>_<kind>."""
    with contextlib.chdir(tmp_path_factory.mktemp('home')):
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([README], 400, show_progress=False)
        text_dataset('data/bpe', bpe, np.array(bpe.encode(README).ids), T=32)
        for arm, flags in ARMS.items():
            two_runs('data/bpe', folder_of(arm, 'rope'), *flags)
        for arm, kind in CASES:
            succeeds(run('export_hf.py', f'--run={folder_of(arm, kind)}', f'--out_dir=out/{arm}_{kind}'))
        words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
        text_dataset('data/text', words, np.random.default_rng(0).integers(0, len(WORDS), 980), T=48)
        run('data_synth.py', *GROUP)
        for name, pair in (('group', GROUPS), ('text', TEXTS)):
            two_runs(f'data/{name}', pair[0])
        yield

def ours(arm, kind):
    """(the run's model, rows of token ids [3, 32])"""
    model = load(folder_of(arm, kind))
    return model, torch.randint(0, 400, (3, 32), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('arm, kind', CASES)
def test_transformers_opens_it(arm, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer     # slow to import
    (model, idx), folder = ours(arm, kind), f'out/{arm}_{kind}'
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info                              # no key missing, unexpected, of another shape
    assert theirs.dtype == torch.float32 and theirs.config.head_dim == 8
    with torch.no_grad():
        a, b = model(idx), theirs(idx).logits
        model.rope = not model.rope
        assert a.std() > 0.5 and (a - b).abs().max() < 1e-5
        assert (model(idx) - b).abs().max() > 0.1                    # positions matter to these weights

    c = runs.read_json(f'{folder}/config.json')             # what transformers before 5 goes by says the same
    assert (c['rope_scaling'] or {'rope_type': 'default'}) | {'rope_theta': c['rope_theta']} == c['rope_parameters']
    assert (c['rope_scaling'] is None) == (kind == 'rope') and c['max_position_embeddings'] == 32

    bpe = Tokenizer.from_file('data/bpe/tokenizer.json')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, 'one<|endoftext|>two'):
        ids = tokenizer(text)['input_ids']
        assert ids == bpe.encode(text).ids and tokenizer.decode(ids) == text

def test_readme_opens_it_in_transformer_lens():
    """The attention patterns that TransformerLens caches are those that analyze.py measures."""
    if not os.environ.get('REQUIRE_TRANSFORMER_LENS'):               # the Makefile requires it: a skip would hide it
        pytest.importorskip('transformer_lens', reason='needs TransformerLens: make test-transformer-lens')
    section = README.split('\n## Open it elsewhere\n')[1].split('\n## ')[0]
    blocks = re.findall(r'(?:^    .*\n)+', section, re.M)
    (command,), (lines,) = ([b for b in blocks if word in b] for word in ('export_hf.py', 'TransformerBridge'))
    assert command.split()[2:] == [f'--run={folder_of("mha", "drope")}', '--out_dir=out/hf'] and "'out/hf'" in lines
    for arm, kind in CASES:
        exec(textwrap.dedent(lines).replace('out/hf', f'out/{arm}_{kind}'), names := {})
        theirs, (model, idx) = names['model'], ours(arm, kind)
        pattern = list(model.trace(torch.arange(20)[None]))[1][1]    # what the README's lines end with
        assert (names['pattern'] - pattern).abs().max() < 1e-5
        logits, cache = theirs.run_with_cache(idx)
        with torch.no_grad():
            assert (model(idx) - logits).abs().max() < 1e-5
        for layer, (_, a) in enumerate(list(model.trace(idx))[1:]):
            b = cache[f'blocks.{layer}.attn.hook_pattern']
            assert (a - b).abs().max() < 1e-5 and not b.triu(1).any() and a.std() > 0.01
        ids = Tokenizer.from_file('data/bpe/tokenizer.json').encode(TEXT).ids
        assert theirs.to_tokens(TEXT)[0].tolist() == ids[:32]        # text enters as in the dataset, without a BOS

def test_bad_exports(tmp_path):
    bad, data, out = tmp_path / 'run', tmp_path / 'data', tmp_path / 'out' / 'hf'
    shutil.copytree(folder_of('mha', 'rope'), bad)
    shutil.copytree('data/bpe', data)
    config = runs.read_config(bad) | {'data_dir': str(data)}
    runs.write_json(f'{bad}/config.json', config)
    def says(*words):
        refuses(run('export_hf.py', f'--run={bad}', f'--out_dir={out}'), *words)
        assert not out.parent.exists() or not os.listdir(out.parent)
    with patch.object(Qwen3, 'positions', lambda model, layer, T: (None, causal_bias(T))):
        says('other positions', 'cannot be exported')
    with patch.object(os, 'replace', side_effect=OSError(28, 'No space left on device')):
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

# -----------------------------------------------------------------------------
# the page: its numbers are the model's, and no token is read as markup

def make(folder, *flags):
    return run('view.py', f'--run={folder}', '--view_rows=0,3', *flags)

def browse(path, fragment):
    """The page as Chromium has made it, text; fails where its console has anything to say."""
    if not CHROMIUM and not os.environ.get('REQUIRE_CHROMIUM'):
        pytest.skip('no chromium here (apt-get install chromium)')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--virtual-time-budget=10000']
    address = f'file://{os.path.abspath(path)}#{fragment}'
    done = subprocess.run([CHROMIUM, *flags, '--dump-dom', address], capture_output=True, text=True, timeout=120)
    assert 'CONSOLE' not in done.stderr, done.stderr
    return done.stdout

def line(page, name):
    """A line of the read-out: (numbers of its note, a number of each run)."""
    note, cells = re.search(rf'<th>{name}<small>(.*?)</small></th>(.*?)</tr>', page).groups()
    return [[float(x) for x in re.findall(r'>?(-?[\d.]+)', part)] for part in (note, cells)]

def test_numbers_are_the_models(t=30):
    page = browse(make(GROUPS[0], f'--other={GROUPS[1]}').stdout.split(':')[0], f'row=1&layer=1&head=1&token={t}')
    data = shards.read('data/group/seed0')
    tokens, topics = (torch.tensor(x[3].astype(int)) for x in (data.val, data.val_topics))
    x, z = tokens[None, :-1], topics[:-1]
    found = re.findall(r'title="(\d+): (\d+), topic (\d), (?:gets|gives) ([\d.e-]+)%"', page)
    found = torch.tensor([[float(x) for x in numbers] for numbers in found]).view(2, 48, 4)
    for r, folder in enumerate(GROUPS):
        net = load(folder)
        A = list(net.trace(x))[2][1][0, 1]                  # of layer 1, head 1, from 0: [T, T]
        weights = torch.cat([A[t, :t + 1], A[t + 1:, t]])   # what it looks at, what looks at it
        largest = torch.cat([A[t].max().expand(t + 1), A[t + 1:].amax(1)])
        assert torch.equal(found[r, :, :3].long(), torch.stack([torch.arange(48), x[0], z], 1))
        shown = found[r, :, 3] / 100
        assert ((shown - weights).abs() <= largest / 255 + 6e-4 * shown).all()  # and the digits that are shown
        assert (shown > 0).all() and shown.std() > 0.01
        [chance], share = line(page, 'On its topic')
        assert share[r] / 100 == pytest.approx(A[t, z == z[t]].sum().item(), abs=1e-3)
        loss = net(x, tokens[None, 1:])[0, t - 1].item()
        assert line(page, 'Loss here')[1][r] == pytest.approx(loss, abs=0.006)
        hidden, parts, own = (part[0, t] for part in list(topic_parts(net, x, z[None, :, None], 3))[2])
        for name, part in (('From its topic', parts[0, z[t]]), ('From itself', own)):
            made = part @ hidden / hidden.square().sum()
            assert line(page, name)[1][r] / 100 == pytest.approx(made.item(), abs=2e-3)
    assert chance / 100 == pytest.approx((z[:t + 1] == z[t]).float().mean().item(), abs=1e-3)
    losses = view.filter_losses(data.meta, torch.tensor(data.val.astype(int)))
    assert losses.mean().item() == pytest.approx(data.meta['references']['filter'], abs=1e-5)
    assert line(page, 'Loss here')[0][0] == pytest.approx(losses[3, t - 1].item(), abs=0.006)

def test_tokens_are_no_markup():
    page = browse(make(TEXTS[0]).stdout.split(':')[0], 'token=40')
    shown = [html.unescape(x) for x in re.findall(r'<span class="token [^>]*>(.*?)</span>', page)]
    tokens = shards.read('data/text').val[0, :-1].tolist()
    assert shown == [WORDS[i].replace('\n', '↵') for i in tokens]
    assert len(set(tokens)) == len(WORDS) and page.count('<script') == 2 and '<img' not in page

def test_it_stands_alone_and_refuses_in_one_line():
    assert not re.search(r'https?:|src=|url\(|@import|fetch\(', view.source('view_template.html'))
    refuses(make(GROUPS[0], '--view_rows=0,6'), 'row is 5')
    refuses(make(GROUPS[0], f'--other={TEXTS[0]}'), 'other layers')
