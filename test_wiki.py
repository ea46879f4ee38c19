"""Wikipedia: cleaning, splitting, packing, restarting, bad input, and the whole chain on articles made here."""
import base64
import errno
import fcntl
import filecmp
import glob
import json
import os
import shutil
import sys
import types
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_mutual_info_score
from tokenizers import Tokenizer

import prepare_wiki
import runs
import sample
import shards
from configurator import configure
from test_train import HERE, run

SMALL = ['--embedder=lsa', '--n_topics=3', '--vocab_size=400', '--block_size=96', '--min_segment_len=16',
         '--val_share=0.2', '--min_chars=100']

def lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)

def make_articles(n=90, seed=0):
    """n articles in three made-up languages, and which; after them a duplicate, a near one and two stubs."""
    rng = np.random.default_rng(seed)
    def words(count):
        return [''.join(rng.choice(list('abcdefghijklmnoprstu'), rng.integers(3, 8))) for _ in range(count)]
    common, own = words(20), [words(60) for _ in range(3)]
    topics, texts = rng.integers(3, size=n), []
    for k in topics:
        drawn = [rng.choice(own[k] if rng.random() < 0.7 else common) for _ in range(rng.integers(40, 200))]
        texts.append(' '.join(drawn))
    texts += [texts[0].upper(), texts[0] + ' x', 'short', None]
    return [{'id': i, 'url': '', 'title': f'Article {i}', 'text': text} for i, text in enumerate(texts)], topics

def make(tmp, *flags):
    return prepare_wiki.main(configure(prepare_wiki.__file__, [
        f'--source={tmp}/articles.jsonl', f'--data_dir={tmp}/data', f'--work_dir={tmp}/work', *SMALL, *flags]))

def refused(match, tmp, *flags):
    """The one line with which the stage stops, before there is a dataset."""
    with pytest.raises(SystemExit) as stop:
        make(tmp, *flags)
    assert match in str(stop.value) and '\n' not in str(stop.value), stop.value
    assert not os.path.exists(f'{tmp}/data')

def same(a, b, *names):
    """Whether two datasets, or these files of them, are equal to the byte."""
    _, differ, missing = filecmp.cmpfiles(a, b, names or os.listdir(a), shallow=False)
    return not differ and not missing

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The folder of articles, work and a dataset made here."""
    tmp = tmp_path_factory.mktemp('wiki')
    (tmp / 'articles.jsonl').write_text(lines(make_articles()[0]))
    make(tmp)
    return tmp

@pytest.fixture
def fresh(made, tmp_path):
    """A folder of the articles alone."""
    shutil.copy(made / 'articles.jsonl', tmp_path)
    return tmp_path

# -----------------------------------------------------------------------------
# packing

@pytest.mark.parametrize('low, high', [(2, 4), (1, 3)])
def test_pack(low, high):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6, 1, 800).astype(int) + 5, 9000)       # as uneven as Wikipedia's
    labels = rng.choice(4, 800, p=[.1, .2, .25, .45]).astype(np.uint8)
    width, least = 257, 24
    pieces = prepare_wiki.pack(np.random.default_rng(2), lengths, labels, width, low, high, least)
    used = np.zeros(lengths.sum(), int)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    for row in np.split(pieces, np.flatnonzero(np.diff(pieces[:, 0])) + 1):
        _, articles, at, size = row.T
        assert size.sum() == width
        assert low <= len(row) <= high and size.min() >= least
        assert (np.diff(labels[articles].astype(int)) != 0).all() and len(set(articles)) == len(articles)
        assert (at + size <= lengths[articles]).all()
        for first, n in zip(starts[articles] + at, size):
            used[first:first + n] += 1
    assert used.max() == 1 and used.mean() >= 0.95                           # each token at most once
    share = np.bincount(labels[pieces[:, 1]], pieces[:, 3]) / pieces[:, 3].sum()
    assert np.abs(share - np.bincount(labels, lengths) / lengths.sum()).max() < 0.03       # topics as their tokens
    sizes = np.bincount(np.unique(pieces[:, 0], return_counts=True)[1])[low:]
    assert (sizes / sizes.sum() > 0.5 / (high - low + 1)).all()                # every number of segments
    one_topic = prepare_wiki.pack(rng, np.full(20, 300), np.zeros(20, np.uint8), width, 2, high, least)
    assert len(one_topic) == 0                                                 # it gives up

def test_weights():
    """Draws without repeats visit topics in proportion to their tokens: the stationary law of the chain."""
    share = np.array([.05, .15, .2, .25, .35])
    w = prepare_wiki.next_topic_weights(share * 1e6)
    P = w / (1 - w)[:, None] * (1 - np.eye(5))
    visits = np.linalg.matrix_power(P / P.sum(1, keepdims=True), 200)[0]
    assert np.abs(visits - share).max() < 0.01

# -----------------------------------------------------------------------------
# a dataset

def test_dataset(made):
    data, meta = shards.read(f'{made}/data'), shards.read_meta(f'{made}/data')
    corpus = meta['corpus']
    assert data.train.shape[1] == 97 and meta['kind'] == 'wiki'
    assert corpus['counts'] == {'read': 94, 'stub': 2, 'duplicate': 1, 'near duplicate': 1}
    assert len(corpus['val_ids']) == 18 and corpus['tokens']['val']['articles'] == 18
    assert corpus['tokens']['train']['used'] >= 0.95 * corpus['tokens']['train']['tokens']
    rows, truth = make_articles()
    labels = prepare_wiki.read_topics(f'{made}/data', 3)['labels']
    assert adjusted_mutual_info_score(labels, truth) > 0.9                     # the clusters are the languages

    # every piece is text of an article of its own split and topic, and no article is in both, no text twice
    tokenizer, seen = Tokenizer.from_file(f'{made}/data/tokenizer.json'), set()
    for split in ('train', 'val'):
        counts, tokens, topics = corpus['tokens'][split], getattr(data, split), getattr(data, f'{split}_topics')
        assert counts['used'] == tokens.size and counts['used'] + counts['unused'] == counts['tokens']
        mine = [i for i in range(90) if (str(i) in corpus['val_ids']) == (split == 'val')]
        for row, z in zip(tokens[:20], topics[:20]):
            for piece in np.split(np.arange(97), np.flatnonzero(np.diff(z.astype(int))) + 1):
                text = tokenizer.decode(row[piece].tolist())
                assert {labels[i] for i in mine if text in rows[i]['text']} == {z[piece[0]]}
                assert text[:20] not in seen
                seen.add(text[:20])

    # whatever the text, decoding gives it back: every code point in a sample, controls and emoji included
    points = np.random.default_rng(0).integers(0, 0x110000, 4000)
    text = ''.join(chr(p) for p in [*points, *range(300)] if not 0xD800 <= p < 0xE000) + ' \n\t  ǆ '
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert max(tokenizer.encode(text).ids) < 400

def test_tokenizer_has_not_seen_validation(tmp_path):
    """A word that is frequent in validation articles alone is no token; in training articles alone it is one."""
    rows, _ = make_articles()
    val = np.random.default_rng([0, 0]).permutation(90)[:18]                   # as prepare_wiki.py splits them
    for i, row in enumerate(rows[:90]):
        row['text'] += (' xyzzyv' if i in val else ' xyzzyt') * 30
    (tmp_path / 'articles.jsonl').write_text(lines(rows))
    make(tmp_path)
    assert set(shards.read_meta(f'{tmp_path}/data')['corpus']['val_ids']) == set(map(str, val))
    encode = Tokenizer.from_file(f'{tmp_path}/data/tokenizer.json').encode
    assert len(encode(' xyzzyt').ids) == 1 and len(encode(' xyzzyv').ids) > 1

def test_clean():
    body = 'e' + ' word' * 40
    text = f'A  <ref name="x">b</ref> c formula_12 [[d]]\n\n\n\n{body}\nReferences\nf'
    assert prepare_wiki.clean(text) == f'A b c d\n\n{body}'
    assert prepare_wiki.hashes('A, b!') == prepare_wiki.hashes('a  B') != prepare_wiki.hashes('abc')
    long = 'x' * 300
    assert prepare_wiki.hashes(long + 'a')[1] == prepare_wiki.hashes(long + 'b')[1]        # the same opening

def test_distinctive():
    texts = ['cat purrs often', 'cat sleeps often', 'dog barks often', 'dog runs often'] * 5
    words = prepare_wiki.distinctive(texts, np.array([0, 0, 1, 1] * 5), 2, 1)
    assert words == [['cat'], ['dog']]

# -----------------------------------------------------------------------------
# done, stopped, killed

def test_done(made, tmp_path, capsys):
    """What is done is skipped and what other parameters leave as it is reused; what was damaged is noticed."""
    tmp = shutil.copytree(made, tmp_path / 'copy')
    make(tmp)
    assert 'is there, with these parameters' in capsys.readouterr().out
    make(tmp, '--n_topics=2', f'--data_dir={tmp}/two')
    out = capsys.readouterr().out
    assert all(f'{phase:10}done before' in out for phase in ('articles', 'embed', 'tokenizer', 'tokens'))
    assert 'clusters  done before' not in out and shards.read_meta(f'{tmp}/two')['n_topics'] == 2
    with pytest.raises(SystemExit, match='built with other parameters.*n_topics is 3 there, 2 here'):
        make(tmp, '--n_topics=2')

    shutil.rmtree(tmp / 'data')
    (where,) = glob.glob(f'{tmp}/work/tokenizer-*')
    open(f'{where}/done.json', 'w').close()                                    # cut short: it is not done
    open(f'{where}/tokenizer.json.1.tmp.json', 'w').close()                    # of a process that was killed
    make(tmp)
    assert not glob.glob(f'{where}/*.tmp*')
    assert same(made / 'data', tmp / 'data') and json.load(open(f'{where}/done.json'))['found'] <= 400
    (tmp / 'articles.jsonl').write_text(lines(make_articles(seed=1)[0]))       # others of that name
    with pytest.raises(SystemExit, match='built with other parameters.*source_digest'):
        make(tmp)
    os.remove(tmp / 'articles.jsonl')                                          # used where its source is not
    assert make(tmp) == f'{tmp}/data'

    shutil.rmtree(tmp / 'data')
    shutil.copy(made / 'articles.jsonl', tmp)
    (lost,) = glob.glob(f'{tmp}/work/articles-*/00000.jsonl')
    kept = open(lost).readlines()[:-1]
    open(lost, 'w').writelines(kept)
    refused(f'{os.path.dirname(lost)}: is not whole, though it was done; delete that folder', tmp)

class Letters:
    """Counts letters; stands in for SentenceTransformer."""
    max_seq_length, calls = 256, 0
    def __init__(self, name, device=None):
        assert name == 'letters'
    def encode(self, texts, normalize_embeddings, **_):
        Letters.calls += 1
        x = np.array([[t.count(c) for c in 'abcdefghijklmnoprstu'] for t in texts], float) + 1e-3
        return x / np.linalg.norm(x, axis=1, keepdims=True)

@pytest.mark.parametrize('embedder', ['lsa', 'letters'])
def test_stopped_anywhere(embedder, fresh, monkeypatch):
    """Stopped before each file that a phase renames, and run again: the same to the byte, no work done anew."""
    monkeypatch.setitem(sys.modules, 'sentence_transformers', types.SimpleNamespace(SentenceTransformer=Letters))
    flag, real, stopped = f'--embedder={embedder}', os.replace, []
    make(fresh, flag, f'--data_dir={fresh}/whole', f'--work_dir={fresh}/whole_work')
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 40)
    Letters.calls = 0
    def replace(temporary, path):
        if path not in stopped:
            stopped.append(path)
            raise KeyboardInterrupt                                            # what a kill leaves, not renamed
        real(temporary, path)
    monkeypatch.setattr(os, 'replace', replace)
    while not os.path.exists(fresh / 'data') and len(stopped) < 40:
        try:
            make(fresh, flag)
        except SystemExit as stop:
            assert 'the same command goes on' in str(stop)
    assert len(stopped) >= 16 and same(fresh / 'data', fresh / 'whole')
    assert not glob.glob(f'{fresh}/work/*/*.tmp*')                             # nor is anything left behind
    vectors = [[np.load(path) for path in sorted(glob.glob(f'{fresh}/{work}/embed-*/*.npy'))]
               for work in ('work', 'whole_work')]
    assert np.array_equal(*map(np.concatenate, vectors))
    assert Letters.calls == (6 if embedder == 'letters' else 0)                # 3 files, each once in vain

def test_held_up(fresh, monkeypatch):
    """By a run at work in the same folder, or by a full disk: one line, and the same command goes on."""
    os.mkdir(fresh / 'work')
    with open(fresh / 'work/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused('another prepare_wiki.py is at work there', fresh)
    def full(path, write):
        raise OSError(errno.ENOSPC, 'No space left on device', path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_wiki, 'save', full)
        refused('No space left on device; make room', fresh)
    make(fresh)

def test_topics_from(made, fresh, monkeypatch):
    """The topics of another run, without its embeddings: the same to the byte; of other articles: refused."""
    published, other = fresh / 'published', fresh / 'other'
    os.mkdir(published)
    for name in ('clusters.json', 'topics.md'):                                # what results/ keeps of a dataset
        shutil.copy(made / 'data' / name, published)
    flag = f'--topics_from={published}'
    with monkeypatch.context() as patch:
        patch.setattr(prepare_wiki, 'embed', None)                             # would be a TypeError
        patch.setattr(prepare_wiki, 'cluster', None)
        make(fresh, flag)
    assert same(made / 'data', fresh / 'data')
    shutil.copytree(published, other)
    found = json.load(open(other / 'clusters.json'))
    labels = zlib.decompress(base64.b64decode(found['labels']))
    found['labels'] = base64.b64encode(zlib.compress(labels[::-1])).decode()
    (other / 'clusters.json').write_text(json.dumps(found))
    with pytest.raises(SystemExit, match='its articles have other topics than those of'):
        make(fresh, f'--topics_from={other}')
    shutil.rmtree(fresh / 'data')
    refused('has 3 topics, but n_topics = 2', fresh, flag, '--n_topics=2')
    refused('no topics there', fresh, f'--topics_from={fresh}')
    refused('its topics are of 90 other articles than these 89', fresh, flag, '--max_articles=89')

# -----------------------------------------------------------------------------
# sources

def test_local_sources(made, fresh):
    """The same articles as parquet, as jsonl with a byte order mark, in a folder beside the work."""
    rows, _ = make_articles()
    for folder in ('a', 'b[1]', 'c'):
        os.mkdir(fresh / folder)
    pq.write_table(pa.Table.from_pylist(rows[:50]), fresh / 'a/1.parquet')
    pq.write_table(pa.Table.from_pylist(rows[50:]), fresh / 'a/2.parquet')
    (fresh / 'b[1]/x[1].jsonl').write_text(lines(rows), encoding='utf-8-sig')
    shutil.copy(fresh / 'articles.jsonl', fresh / 'c')
    sources = ['a', 'a/*.parquet', 'b[1]', 'b[1]/x[1].jsonl', 'c', 'c']       # c twice: what it wrote is no source
    for source in sources:
        to = f'{fresh}/c/{sources.index(source)}'
        make(fresh, f'--source={fresh}/{source}', f'--data_dir={to}/data', f'--work_dir={to}/work')
        assert same(made / 'data', f'{to}/data', 'train.bin')

def test_hub(made, tmp_path, monkeypatch):
    """A dataset of the hub, whose network goes away once, after 60 articles; one without a column."""
    rows, outages, columns = make_articles()[0], [60], ['id', 'title', 'text']
    def skip(n):
        if outages:
            yield from rows[n:outages.pop()]
            raise ConnectionError('the network is gone')
        yield from rows[n:]
    def load_dataset(*_, **__):
        return types.SimpleNamespace(column_names=columns, skip=skip)
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 40)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    flag = '--source=some/articles'
    with pytest.raises(SystemExit, match='from the hub .the network is gone.*the same command goes on'):
        make(tmp_path, flag)
    assert same(made / 'data', make(tmp_path, flag), 'train.bin')
    assert shards.read_meta(f'{tmp_path}/data')['corpus']['counts']['read'] == 94          # none twice
    columns.remove('title')
    with pytest.raises(SystemExit, match='no column title'):
        make(tmp_path, '--source=some/others', f'--data_dir={tmp_path}/x')

def test_no_network(tmp_path):
    """The hub, out of reach, told by its own variable (without it the libraries try again for some 30 s first)."""
    done = run('prepare_wiki.py', f'--work_dir={tmp_path}/work', f'--data_dir={tmp_path}/data',
               env={'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert done.returncode == 1 and not os.path.exists(tmp_path / 'data')
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('wikimedia/wikipedia (20231101.en): cannot be read from the hub')
    assert 'Traceback' not in done.stderr

# -----------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('text, match', [
    ('', '0 articles after cleaning (0 read), too few for 3 topics'),
    (lines(make_articles(3)[0]), '3 articles after cleaning (7 read), too few for 3 topics'),
    ('{"id": 1, "title"', 'x.jsonl, line 1: is not JSON'),
    ('{"id": 1, "title": "é", "text": "x"}', 'x.jsonl: is not UTF-8'),
    ('{"id": 1, "title": "t"}\n', 'x.jsonl, line 1: no text'),
    ('\n{"id": 7, "title": "t", "text": 5}\n', 'the text of article 7 is a int'),
    (lines({'id': i, 'title': str(i), 'text': ' '.join(map(str, range(i, 200 + i)))} for i in range(9)),
     'hold no words to tell topics by'),
    (lines({'id': i, 'title': 'word', 'text': 'word ' * (40 + i)} for i in range(9)), 'lsa finds no words')])
def test_bad_lines(text, match, tmp_path):
    (tmp_path / 'x.jsonl').write_text(text, encoding='latin-1')
    refused(match, tmp_path, f'--source={tmp_path}/x.jsonl')

def test_bad_files(tmp_path):
    refused('no .parquet or .jsonl file there', tmp_path, '--source=nothing/here/at/all')
    pq.write_table(pa.table({'id': ['1'], 'body': ['x']}), tmp_path / 'x.parquet')
    refused('x.parquet: no column text, title', tmp_path, f'--source={tmp_path}/x.parquet')
    (tmp_path / 'cut.parquet').write_bytes((tmp_path / 'x.parquet').read_bytes()[:-40])
    refused('cut.parquet: cannot be read', tmp_path, f'--source={tmp_path}/cut.parquet')

@pytest.mark.parametrize('flag, match', [
    ('embedder=', 'embedder is empty'), ('embedder=./no_model', 'cannot be loaded'),
    ('min_segment_len=60', 'do not fit in 97 tokens'), ('vocab_size=100', 'vocab_size=100: choose'),
    ('max_segments=1', 'rows of one topic are not made'), ('min_segments=5', 'min_segments=5 is more than 4')])
def test_bad_settings(flag, match, fresh):
    refused(match, fresh, f'--{flag}')

# -----------------------------------------------------------------------------
# the experiment

@pytest.fixture(scope='module')
def experiment(made, tmp_path_factory):
    """config/wiki_small.py, tiny, on articles made here, in a copy of the scripts."""
    here = str(tmp_path_factory.mktemp('checkout'))
    for path in [made / 'articles.jsonl', *glob.glob(os.path.join(HERE, '*.py'))]:
        shutil.copy(path, here)
    shutil.copytree(os.path.join(HERE, 'config'), f'{here}/config')
    done = run('run_experiment.py', 'config/wiki_small.py', '--source=articles.jsonl', *SMALL, '--n_layer=2',
               '--n_embd=16', '--n_head=2', '--head_dim=8', '--mlp_hidden=24', '--batch_size=4', '--max_iters=12',
               '--eval_interval=6', '--eval_rows=12', '--analysis_rows=12', '--null_draws=20', '--jobs=1',
               '--publish=True', cwd=here)
    assert done.returncode == 0, done.stderr
    return here

def test_experiment(experiment):
    _, rows = runs.read_rows(f'{experiment}/out/wiki_small')
    assert len(rows) == 6 and all(r['references']['filter'] is r['gap_closed'] is None for r in rows)
    assert all(0 < r['probe']['references']['running_mean'] <= 1 for r in rows)
    for name in ('loss', 'order', 'heads', 'maps', 'probe', 'effects', 'lens'):
        assert os.path.getsize(f'{experiment}/out/wiki_small/figures/{name}.png') > 5000

    # nothing is published from which a row could be read: no words and no tokens in running order
    place = f'{experiment}/results/wiki_small'
    assert {'clusters.json', 'topics.md', 'runs.jsonl', 'summary.md'} <= set(os.listdir(place))
    tokenizer = Tokenizer.from_file(f'{experiment}/data/wiki_small/tokenizer.json')
    ids = shards.read(f'{experiment}/data/wiki_small').val[0, :12].tolist()
    def squeeze(text):
        return ''.join(text.split())
    traces = [squeeze(json.dumps(ids)[1:-1]), squeeze(tokenizer.decode(ids))]
    texts = [squeeze(open(path, encoding='utf-8').read()) for path in glob.glob(f'{place}/**/*', recursive=True)
             if os.path.isfile(path) and not path.endswith('.png')]
    assert len(texts) >= 5 and not any(trace in text for trace in traces for text in texts)

def test_sample(experiment, monkeypatch, capsys):
    """As a script and, for time, in this process."""
    flags = ['--run=out/wiki_small/mha_shuffled_rope/seed0', '--prompt=abc', '--n_tokens=9', '--n_samples=2']
    def texts(*more):
        return sample.main(configure(sample.__file__, [*flags, '--device=cpu', *more]))
    monkeypatch.chdir(experiment)
    first, done = texts(), run('sample.py', *flags, cwd=experiment)
    assert done.returncode == 0 and done.stdout == capsys.readouterr().out
    assert done.stdout.count('--- ') == 2 and '\nabc' in done.stdout
    assert first != texts('--seed=1') and texts('--temperature=1e-40') == texts('--temperature=0')
    with pytest.raises(SystemExit, match='prompt is empty'):
        texts('--prompt=')
    meta = shards.read_meta('data/wiki_small')
    meta['files']['train.bin']['sha256'] = 'f' * 64                            # made again, with another tokenizer
    runs.write_json('data/wiki_small/meta.json', meta)
    with pytest.raises(SystemExit, match='^[^\n]*another dataset[^\n]*$'):
        texts()

# -----------------------------------------------------------------------------
# the real thing

@pytest.mark.skipif(not (os.environ.get('WIKI_ARTICLES') and os.environ.get('MINILM_PATH')),
                    reason='WIKI_ARTICLES (parquet or jsonl) and MINILM_PATH (all-MiniLM-L6-v2) are not set')
def test_real(tmp_path):
    """1,000 real articles and the real embedder: topics that a second seed finds too, nearly all tokens used."""
    make(tmp_path, f'--source={os.environ["WIKI_ARTICLES"]}', f'--embedder={os.environ["MINILM_PATH"]}',
         '--max_articles=1000', '--n_topics=8', '--vocab_size=2048', '--block_size=256', '--min_segment_len=32',
         '--val_share=0.1', '--min_chars=500')
    corpus = shards.read_meta(str(tmp_path / 'data'))['corpus']
    assert corpus['articles'] == 1000 and min(corpus['topics']['ami']) > 0.4
    assert corpus['topics']['largest_share'] < 0.4
    assert corpus['tokens']['train']['used'] > 0.95 * corpus['tokens']['train']['tokens']
