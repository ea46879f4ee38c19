"""The page of a run in headless Chromium: its numbers are the model's, and no token is read as markup."""
import contextlib
import html
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import shards
import view
from model import load
from tensor_lens import topic_parts
from test_train import refuses, run, two_runs

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
GROUP = ['--chain=group', '--n_groups=4', '--vocab_size=16', '--n_topics=3', '--block_size=48', '--min_segment_len=9',
         '--repeats=False', '--train_rows=60', '--val_rows=6', '--data_dir=data/group']
WORDS = ['<script>alert(1)</script>', '</script>', '<!--', '<img src=x>', '&lt;', '"', '\\u003c', ' 東京', '\n', '$&']
GROUPS, TEXTS = ([f'out/{name}/mha_shuffled_{kind}/seed0' for kind in ('rope', 'drope')] for name in ('group', 'text'))

@pytest.fixture(scope='module', autouse=True)
def home(tmp_path_factory):
    """Its out/group and out/text have a run with RoPE and one without, by the real stages, with weights that matter."""
    with contextlib.chdir(tmp_path_factory.mktemp('home')):
        run('data_synth.py', *GROUP)
        tokens = np.random.default_rng(0).integers(0, len(WORDS), (20, 49))
        shards.write('data/text', dict(train=tokens, train_topics=tokens % 3, val=tokens, val_topics=tokens % 3),
                     dict(vocab_size=16, block_size=48, n_topics=3))
        Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)})).save('data/text/tokenizer.json')
        for name, pair in (('group', GROUPS), ('text', TEXTS)):
            two_runs(f'data/{name}', pair[0])
        yield

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
