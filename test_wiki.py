"""Wikipedia: cleaning, splitting, packing, restarting, bad input, and the whole chain on articles made here."""
import base64
import errno
import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score

import measures
import prepare_wiki
import shards
from configurator import configure
from test_train import HERE, drawn_again, run

N_TOPICS, SMALL = 3, ['--embedder=lsa', '--n_topics=3', '--vocab_size=400', '--block_size=96', '--min_segment_len=16',
                      '--val_share=0.2', '--min_chars=100']

def write_articles(path, n=90, seed=0):
    """n articles as jsonl, each of one of three made-up languages over one alphabet; returns their topics by id."""
    rng = np.random.default_rng(seed)
    word = lambda: ''.join(rng.choice(list('abcdefghijklmnoprstu'), rng.integers(3, 8)))
    common, own = [word() for _ in range(20)], [[word() for _ in range(60)] for _ in range(N_TOPICS)]
    topics = {}
    with open(path, 'w', encoding='utf-8') as f:
        for i in range(n):
            k = int(rng.integers(N_TOPICS))
            words = [str(rng.choice(own[k] if rng.random() < 0.7 else common)) for _ in range(rng.integers(40, 200))]
            topics[str(i)] = k
            f.write(json.dumps({'id': i, 'url': '', 'title': f'Article {i}', 'text': ' '.join(words)}) + '\n')
    return topics

def config(tmp, *flags, source='articles.jsonl'):
    return configure(prepare_wiki.__file__, [f'--source={tmp}/{source}', f'--data_dir={tmp}/data',
                                             f'--work_dir={tmp}/work', *SMALL, *flags])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A dataset of articles made here: (folder of everything, true topics by id)."""
    tmp = str(tmp_path_factory.mktemp('wiki'))
    topics = write_articles(f'{tmp}/articles.jsonl')
    prepare_wiki.main(config(tmp))
    return tmp, topics

def refused(match, *args, **kw):
    """The one line with which the stage stops."""
    with pytest.raises(SystemExit) as stop:
        prepare_wiki.main(config(*args, **kw))
    assert match in str(stop.value) and '\n' not in str(stop.value), stop.value
    assert not os.path.exists(os.path.join(args[0], 'data'))

# -----------------------------------------------------------------------------
# packing

@pytest.mark.parametrize('low, high', [(2, 4), (1, 1), (1, 3)])
def test_pack(low, high):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6, 1, 800).astype(int) + 5, 9000)        # as uneven as Wikipedia's
    labels = rng.choice(4, 800, p=[.1, .2, .25, .45]).astype(np.uint8)
    width, least = 257, 24
    pieces = prepare_wiki.pack(np.random.default_rng(2), lengths, labels, width, low, high, least)
    used = np.zeros(lengths.sum(), int)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    for row in np.split(pieces, np.flatnonzero(np.diff(pieces[:, 0])) + 1):
        _, articles, at, size = row.T
        assert size.sum() == width
        topics = labels[articles]
        if high == 1:
            assert len(set(topics)) == 1
        else:
            assert low <= len(row) <= high and size.min() >= least
            assert (np.diff(topics.astype(int)) != 0).all() and len(set(articles)) == len(articles)
        for a, s, n in zip(articles, at, size):
            assert s + n <= lengths[a]
            used[starts[a] + s:starts[a] + s + n] += 1
    assert used.max() == 1 and used.mean() >= 0.95                              # each token at most once, nearly all
    if high > 1:                                                                # topics as often as they have tokens
        share = np.bincount(labels[pieces[:, 1]], pieces[:, 3]) / pieces[:, 3].sum()
        assert np.abs(share - np.bincount(labels, lengths) / lengths.sum()).max() < 0.03
        sizes = np.bincount(np.unique(pieces[:, 0], return_counts=True)[1])[low:]
        assert (sizes / sizes.sum() > 0.5 / (high - low + 1)).all()             # every number of segments

def test_pack_gives_up():
    """One topic alone cannot be mixed; nothing hangs and nothing is invented."""
    one_topic = np.zeros(20, np.uint8)
    assert len(prepare_wiki.pack(np.random.default_rng(0), np.full(20, 300), one_topic, 257, 2, 4, 24)) == 0

def test_weights():
    """Draws without repeats visit topics in proportion to their tokens: the stationary law of the chain itself."""
    share = np.array([.05, .15, .2, .25, .35])
    w = prepare_wiki.next_topic_weights(share * 1e6)
    P = w / (1 - w)[:, None] * (1 - np.eye(5))
    visits = np.linalg.matrix_power(P / P.sum(1, keepdims=True), 200)[0]
    assert np.abs(visits - share).max() < 0.01

# -----------------------------------------------------------------------------
# a dataset

def test_dataset(made):
    tmp, truth = made
    data, meta = shards.read(f'{tmp}/data'), shards.read_meta(f'{tmp}/data')
    corpus = meta['corpus']
    assert data.train.shape[1] == 97 and meta['kind'] == 'wiki' and corpus['counts']['read'] == 90
    assert len(corpus['val_ids']) == 18 and corpus['tokens']['val']['articles'] == 18
    for split in ('train', 'val'):
        counts, tokens = corpus['tokens'][split], getattr(data, split)
        assert counts['used'] == tokens.size and counts['used'] + counts['unused'] == counts['tokens']
    assert corpus['tokens']['train']['used'] >= 0.95 * corpus['tokens']['train']['tokens']
    labels = prepare_wiki.read_topics(f'{tmp}/data', N_TOPICS)['labels']
    assert adjusted_mutual_info_score(labels, [*truth.values()]) > 0.9          # the clusters are the languages

    # every piece is text of an article of its own split and topic, and no article is in both
    from tokenizers import Tokenizer
    decode = Tokenizer.from_file(f'{tmp}/data/tokenizer.json').decode
    texts = {a['id']: a['text'] for a in prepare_wiki.articles(glob.glob(f'{tmp}/work/articles-*')[0])}
    of_label = {i: int(k) for i, k in zip(texts, labels)}
    for split in ('train', 'val'):
        mine = {i for i in texts if (i in corpus['val_ids']) == (split == 'val')}
        for tokens, topics in zip(getattr(data, split)[:20], getattr(data, f'{split}_topics')[:20]):
            for piece in np.split(np.arange(97), np.flatnonzero(np.diff(topics.astype(int))) + 1):
                text = decode(tokens[piece].tolist())
                assert {of_label[i] for i in mine if text in texts[i]} == {topics[piece[0]]}

def test_tokenizer_keeps_everything(made):
    """Whatever the text, decoding gives it back: every code point in a sample, controls and emoji included."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(f'{made[0]}/data/tokenizer.json')
    points = np.random.default_rng(0).integers(0, 0x110000, 4000)
    text = ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000) + ' \n\t  ǆ ' + ''.join(map(chr, range(300)))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert max(tokenizer.encode(text).ids) < 400

def test_clean():
    text = prepare_wiki.clean('A  <ref name="x">b</ref> c formula_12 [[d]]\n\n\n\ne' + ' word' * 40 + '\nReferences\nf')
    assert text.startswith('A b c d\n\ne word') and text.endswith('word')
    assert prepare_wiki.hashes('A, b!') == prepare_wiki.hashes('a  B') != prepare_wiki.hashes('abc')
    long = 'x' * 300
    assert prepare_wiki.hashes(long + 'a')[1] == prepare_wiki.hashes(long + 'b')[1]      # the same opening

def test_duplicates(tmp_path, capsys):
    write_articles(tmp_path / 'a.jsonl')
    lines = open(tmp_path / 'a.jsonl').read().splitlines()
    first = json.loads(lines[0])
    extra = [first | {'id': 'twin', 'text': first['text'].upper()},
             first | {'id': 'near', 'text': first['text'] + ' x'},
             first | {'id': 'stub', 'text': 'short'}, first | {'id': 'none', 'text': None}]
    open(tmp_path / 'articles.jsonl', 'w').write('\n'.join([*lines, *map(json.dumps, extra)]) + '\n')
    prepare_wiki.main(config(tmp_path))
    assert '94 read, 2 stub, 1 duplicate, 1 near duplicate: 90 kept' in capsys.readouterr().out

def test_distinctive():
    texts = ['cat purrs often', 'cat sleeps often', 'dog barks often', 'dog runs often'] * 5
    words = prepare_wiki.distinctive(texts, np.array([0, 0, 1, 1] * 5), 2, 1)
    assert words == [['cat'], ['dog']]

# -----------------------------------------------------------------------------
# done, stopped, killed

def same(a, b):
    names = ('train.bin', 'train_topics.bin', 'val.bin', 'val_topics.bin', 'meta.json', 'tokenizer.json',
             'clusters.json')
    return all(open(f'{a}/data/{n}', 'rb').read() == open(f'{b}/data/{n}', 'rb').read() for n in names)

def test_skips(made, capsys):
    tmp, _ = made
    prepare_wiki.main(config(tmp))
    assert 'is there, with these parameters' in capsys.readouterr().out
    prepare_wiki.main(config(tmp, '--n_topics=2', f'--data_dir={tmp}/two'))
    out = capsys.readouterr().out
    for phase in ('articles', 'embed', 'tokenizer', 'tokens'):
        assert f'{phase:10}done before' in out
    assert 'clusters  done before' not in out and shards.read_meta(f'{tmp}/two')['n_topics'] == 2
    with pytest.raises(SystemExit, match='built with other parameters.*n_topics is 3 there, 2 here'):
        prepare_wiki.main(config(tmp, '--n_topics=2'))

def test_other_articles_of_that_name(tmp_path):
    """The same file name with other articles is another corpus, and a work folder that lost a file says so."""
    write_articles(tmp_path / 'articles.jsonl')
    prepare_wiki.main(config(tmp_path))
    write_articles(tmp_path / 'articles.jsonl', seed=1)
    with pytest.raises(SystemExit, match='built with other parameters.*source_digest'):
        prepare_wiki.main(config(tmp_path))
    os.remove(tmp_path / 'articles.jsonl')                                      # used where its source is not
    assert prepare_wiki.main(config(tmp_path)) == f'{tmp_path}/data'
    write_articles(tmp_path / 'articles.jsonl')
    shutil.rmtree(tmp_path / 'data')
    os.remove(glob.glob(f'{tmp_path}/work/articles-*/00000.jsonl')[0])
    refused('is not whole, though it was done; delete that folder', tmp_path, '--n_topics=2')

def test_stopped_anywhere(made, tmp_path, monkeypatch):
    """Stopped before each file that a phase renames, whatever it is, and run again: the same dataset, to the byte."""
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 40)
    write_articles(tmp_path / 'articles.jsonl')
    real, calls, stops, names = os.replace, 0, 0, set()
    def replace(temporary, path):
        nonlocal calls
        calls += 1
        if calls == 2 + stops % 3:                                              # one to three files a run: then
            names.add(os.path.basename(path))                                   # what a kill leaves, not renamed
            raise KeyboardInterrupt
        real(temporary, path)
    monkeypatch.setattr(os, 'replace', replace)
    while not os.path.exists(tmp_path / 'data'):
        calls = 0
        try:
            prepare_wiki.main(config(tmp_path))
        except SystemExit as stop:
            assert 'the same command goes on' in str(stop)
            stops += 1
        assert stops < 40
    print(stops, sorted(names))
    assert stops >= 7 and same(made[0], tmp_path) and len(names) >= 5
    assert not glob.glob(f'{tmp_path}/work/*/*.tmp*')                           # nor is anything left behind

def test_done_is_only_what_says_so(made, tmp_path):
    """A done.json that was cut short is none; articles that were lost are noticed, and by their own folder."""
    write_articles(tmp_path / 'articles.jsonl')
    shutil.copytree(f'{made[0]}/work', tmp_path / 'work')
    (where,) = glob.glob(f'{tmp_path}/work/tokenizer-*')
    open(f'{where}/done.json', 'w').close()
    open(f'{where}/tokenizer.json.1.tmp.json', 'w').close()                     # of a process that was killed
    prepare_wiki.main(config(tmp_path))
    assert not glob.glob(f'{where}/*.tmp*')
    assert same(made[0], tmp_path) and json.load(open(f'{where}/done.json'))['found'] <= 400
    shutil.rmtree(tmp_path / 'data')
    (lost,) = glob.glob(f'{tmp_path}/work/articles-*/00000.jsonl')
    lines = open(lost, encoding='utf-8').readlines()
    open(lost, 'w', encoding='utf-8').writelines(lines[:-1])
    refused(f'{os.path.dirname(lost)}: is not whole', tmp_path)

def test_two_at_once(tmp_path):
    write_articles(tmp_path / 'articles.jsonl')
    os.mkdir(tmp_path / 'work')
    with open(tmp_path / 'work/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused('another prepare_wiki.py is at work there', tmp_path)
    prepare_wiki.main(config(tmp_path))

def test_topics_from(made, tmp_path, monkeypatch):
    """The topics of another run, without its embeddings: the same dataset to the byte; of other articles: refused."""
    write_articles(tmp_path / 'articles.jsonl')
    published = tmp_path / 'published'                                          # all that results/ keeps of a dataset
    os.mkdir(published)
    for name in ('clusters.json', 'topics.md'):
        shutil.copy(f'{made[0]}/data/{name}', published)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_wiki, 'embed', None)                              # would be a TypeError
        patch.setattr(prepare_wiki, 'cluster', None)
        prepare_wiki.main(config(tmp_path, f'--topics_from={published}'))
    assert same(made[0], tmp_path)
    found = json.load(open(published / 'clusters.json'))
    labels = np.frombuffer(zlib.decompress(base64.b64decode(found['labels'])), np.uint8)
    found['labels'] = base64.b64encode(zlib.compress(labels[::-1].tobytes())).decode()
    os.mkdir(tmp_path / 'other')
    json.dump(found, open(tmp_path / 'other/clusters.json', 'w'))
    shutil.copy(published / 'topics.md', tmp_path / 'other')
    with pytest.raises(SystemExit, match='its articles have other topics than those of'):
        prepare_wiki.main(config(tmp_path, f'--topics_from={tmp_path}/other'))
    shutil.rmtree(tmp_path / 'data')
    refused('has 3 topics, but n_topics = 2', tmp_path, f'--topics_from={published}', '--n_topics=2')
    refused('no topics there', tmp_path, f'--topics_from={tmp_path}')
    refused('its topics are of 90 other articles than these 89', tmp_path, f'--topics_from={published}',
            '--max_articles=89')

# -----------------------------------------------------------------------------
# sources

def test_sources(made, tmp_path, monkeypatch):
    """The same articles as parquet, as a folder beside the work, as jsonl with a byte order mark, from the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    write_articles(tmp_path / 'articles.jsonl')
    lines = open(tmp_path / 'articles.jsonl', encoding='utf-8').read()
    rows = [json.loads(line) | {'id': str(i)} for i, line in enumerate(lines.splitlines())]
    for folder in ('a', 'b[1]', 'c'):
        os.mkdir(tmp_path / folder)
    pq.write_table(pa.Table.from_pylist(rows[:50]), tmp_path / 'a/1.parquet')
    pq.write_table(pa.Table.from_pylist(rows[50:]), tmp_path / 'a/2.parquet')
    open(tmp_path / 'b[1]/x[1].jsonl', 'w', encoding='utf-8-sig').write(lines)
    shutil.copy(tmp_path / 'articles.jsonl', tmp_path / 'c')
    equal = lambda folder: open(f'{folder}/train.bin', 'rb').read() == open(f'{made[0]}/data/train.bin', 'rb').read()
    for i, source in enumerate(('a', 'a/*.parquet', 'b[1]', 'b[1]/x[1].jsonl')):
        prepare_wiki.main(config(tmp_path, f'--data_dir={tmp_path}/d{i}', f'--work_dir={tmp_path}/w{i}', source=source))
        assert equal(tmp_path / f'd{i}')
    for _ in range(2):                                                          # its own files are no source
        inside = (f'--data_dir={tmp_path}/c/data', f'--work_dir={tmp_path}/c/work')
        assert prepare_wiki.main(config(tmp_path, *inside, source='c')) and equal(tmp_path / 'c/data')

    class Stream(list):
        """Stands in for a dataset of the hub; the network goes away once, after 60 articles."""
        column_names, left = list(rows[0]), 60
        def skip(self, n):
            return Stream(self[n:])
        def __iter__(self):
            for row in list.__iter__(self):
                if Stream.left == 0:
                    Stream.left = -1
                    raise ConnectionError('the network is gone')
                Stream.left -= Stream.left > 0
                yield row
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 40)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda *a, **kw: Stream(rows)))
    flags = ('--source=some/articles', f'--data_dir={tmp_path}/hub', f'--work_dir={tmp_path}/work_hub')
    with pytest.raises(SystemExit, match='cannot be read from the hub .the network is gone.*the same command goes on'):
        prepare_wiki.main(config(tmp_path, *flags))
    prepare_wiki.main(config(tmp_path, *flags))
    assert equal(tmp_path / 'hub')
    Stream.column_names = ['id', 'text']
    with pytest.raises(SystemExit, match='no column title'):
        prepare_wiki.main(config(tmp_path, '--source=some/others', f'--data_dir={tmp_path}/x'))

def test_tokenizer_has_not_seen_validation(tmp_path):
    """A word that is frequent in validation articles alone is no token; in training articles alone it is one."""
    from tokenizers import Tokenizer
    write_articles(tmp_path / 'articles.jsonl')
    rows = [json.loads(line) for line in open(tmp_path / 'articles.jsonl')]
    val = np.zeros(90, bool)
    val[np.random.default_rng([0, 0]).permutation(90)[:18]] = True              # as prepare_wiki.py splits them
    for row, is_val in zip(rows, val):
        row['text'] += (' xyzzyv' if is_val else ' xyzzyt') * 30
    open(tmp_path / 'articles.jsonl', 'w').writelines(json.dumps(row) + '\n' for row in rows)
    prepare_wiki.main(config(tmp_path))
    assert set(shards.read_meta(f'{tmp_path}/data')['corpus']['val_ids']) == {str(i) for i in np.flatnonzero(val)}
    encode = Tokenizer.from_file(f'{tmp_path}/data/tokenizer.json').encode
    assert len(encode(' xyzzyt').ids) == 1 and len(encode(' xyzzyv').ids) > 1

def test_stopped_embedding(tmp_path, monkeypatch):
    """A model that is stopped in its second file begins there again, and its vectors are the undisturbed ones."""
    class Model:
        """Counts letters; stands in for SentenceTransformer."""
        max_seq_length, seen, stop_after = 256, 0, 90
        def __init__(self, name, device=None):
            assert name == 'letters'
        def encode(self, texts, normalize_embeddings, **_):
            if Model.seen + len(texts) > Model.stop_after:
                raise KeyboardInterrupt
            Model.seen += len(texts)
            x = np.array([[t.count(c) for c in 'abcdefghijklmnoprstu'] for t in texts], float) + 1e-3
            return x / np.linalg.norm(x, axis=1, keepdims=True)
    monkeypatch.setitem(sys.modules, 'sentence_transformers', types.SimpleNamespace(SentenceTransformer=Model))
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 40)
    write_articles(tmp_path / 'articles.jsonl')
    vectors = lambda work: [np.load(f) for f in prepare_wiki.chunks(glob.glob(f'{tmp_path}/{work}/embed-*')[0], '.npy')]
    whole = (f'--work_dir={tmp_path}/whole', f'--data_dir={tmp_path}/x')
    prepare_wiki.main(config(tmp_path, '--embedder=letters', *whole))
    Model.seen, Model.stop_after = 0, 60
    with pytest.raises(SystemExit, match='the same command goes on'):
        prepare_wiki.main(config(tmp_path, '--embedder=letters'))
    assert Model.seen == 40 and len(vectors('work')) == 1
    Model.stop_after = 90
    prepare_wiki.main(config(tmp_path, '--embedder=letters'))
    assert Model.seen == 90 and np.array_equal(np.concatenate(vectors('whole')), np.concatenate(vectors('work')))

def test_disk_full(tmp_path, monkeypatch):
    write_articles(tmp_path / 'articles.jsonl')
    def full(path, write):
        raise OSError(errno.ENOSPC, 'No space left on device', path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_wiki, 'save', full)
        refused('No space left on device; make room', tmp_path)
    prepare_wiki.main(config(tmp_path))                                         # and goes on

# -----------------------------------------------------------------------------
# bad input

def test_bad_input(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({'id': ['1'], 'body': ['x']}), tmp_path / 'x.parquet')
    refused('x.parquet: no column text, title', tmp_path, source='x.parquet')
    (tmp_path / 'cut.parquet').write_bytes(open(tmp_path / 'x.parquet', 'rb').read()[:-40])
    refused('cut.parquet: cannot be read', tmp_path, source='cut.parquet')
    (tmp_path / 'empty.jsonl').write_text('')
    refused('0 articles after cleaning (0 read), too few for 3 topics', tmp_path, source='empty.jsonl')
    (tmp_path / 'latin.jsonl').write_bytes('{"id": 1, "title": "é", "text": "x"}'.encode('latin-1'))
    refused('latin.jsonl: is not UTF-8', tmp_path, source='latin.jsonl')
    (tmp_path / 'half.jsonl').write_text('{"id": 1, "title"')
    refused('half.jsonl, line 1: is not JSON', tmp_path, source='half.jsonl')
    (tmp_path / 'key.jsonl').write_text('{"id": 1, "title": "t"}\n')
    refused('key.jsonl, line 1: no text', tmp_path, source='key.jsonl')
    refused('no .parquet or .jsonl file there', tmp_path, source='nothing/here/at/all')
    write_articles(tmp_path / 'few.jsonl', n=3)
    refused('3 articles after cleaning (3 read), too few for 3 topics', tmp_path, source='few.jsonl')
    write_articles(tmp_path / 'articles.jsonl')
    (tmp_path / 'type.jsonl').write_text('\n{"id": 7, "title": "t", "text": 5}\n')
    refused('the text of article 7 is a int', tmp_path, source='type.jsonl')
    (tmp_path / 'sums.jsonl').write_text(''.join(
        json.dumps({'id': i, 'title': str(i), 'text': ' '.join(map(str, range(i, 200 + i)))}) + '\n' for i in range(9)))
    refused('hold no words to tell topics by', tmp_path, source='sums.jsonl')
    (tmp_path / 'one.jsonl').write_text(''.join(
        json.dumps({'id': i, 'title': 'word', 'text': 'word ' * (40 + i)}) + '\n' for i in range(9)))
    refused('lsa finds no words', tmp_path, source='one.jsonl')
    refused('embedder is empty', tmp_path, '--embedder=')
    refused('cannot be loaded', tmp_path, f'--embedder={tmp_path}/no_model')
    refused('do not fit in 97 tokens', tmp_path, '--min_segment_len=60')
    refused('vocab_size=100: choose', tmp_path, '--vocab_size=100')

def test_no_network(tmp_path):
    """The hub, out of reach, told by its own variable (without it the libraries try again for some 30 s first)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, 'prepare_wiki.py'), f'--work_dir={tmp_path}/work',
                           f'--data_dir={tmp_path}/data'], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert done.returncode == 1 and not os.path.exists(tmp_path / 'data')
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('wikimedia/wikipedia (20231101.en): cannot be read from the hub')
    assert 'Traceback' not in done.stderr

# -----------------------------------------------------------------------------
# the experiment

def test_bag_of_tokens():
    """Against a dense bag, counted token by token."""
    rng = np.random.default_rng(0)
    z = np.repeat(rng.integers(0, 3, (40, 2)), 15, axis=1)                      # [rows, T]
    x = np.where(rng.random(z.shape) < .5, z, rng.integers(0, 9, z.shape))
    train, test = np.arange(0, 600, 3), np.arange(600, 1200, 2)
    def bag(at):
        counts = np.array([np.bincount(x[i // 30, :i % 30 + 1], minlength=9) for i in at])
        counts = np.log1p(counts)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)
    expected = LogisticRegression(C=10, tol=1e-6, max_iter=1000).fit(bag(train), z.ravel()[train]).score(
        bag(test), z.ravel()[test])
    found = measures.bag_of_tokens(x, z, train, test, 9)
    assert abs(found - expected) < 0.011 and found > 0.5

@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
    """config/wiki_small.py, tiny, on articles made here, in a copy of the scripts."""
    here = str(tmp_path_factory.mktemp('checkout'))
    for path in glob.glob(os.path.join(HERE, '*.py')):
        shutil.copy(path, here)
    shutil.copytree(os.path.join(HERE, 'config'), f'{here}/config')
    write_articles(f'{here}/articles.jsonl')
    done = run('run_experiment.py', 'config/wiki_small.py', '--source=articles.jsonl', *SMALL, '--n_layer=2',
               '--n_embd=16', '--n_head=2', '--head_dim=8', '--mlp_hidden=24', '--batch_size=4', '--max_iters=12',
               '--eval_interval=6', '--eval_rows=12', '--analysis_rows=12', '--null_draws=20', '--jobs=1',
               '--publish=True', cwd=here)
    assert done.returncode == 0, done.stderr
    return here

def test_experiment(experiment):
    summary = json.load(open(f'{experiment}/out/wiki_small/summary.json'))
    assert len(summary['runs']) == 6 and summary['references']['filter'] is None
    analysis = json.load(open(f'{experiment}/out/wiki_small/mha_shuffled_rope/seed0/analysis.json'))
    assert 0 < analysis['probe']['bag'] <= 1 and analysis['probe']['ceiling'] is None
    assert analysis['probe']['baseline'] >= analysis['probe']['bag'] and len(analysis['attends']) == 3
    words = analysis['words']
    first = ''.join(t for t, same in zip(words['tokens'], np.cumprod(
        np.array(words['topics']) == words['topics'][0])) if same)              # the first segment
    assert len(words['tokens']) == len(words['heads'][0]['weights']) == 96
    assert abs(sum(words['heads'][0]['weights']) - 1) < 0.01
    assert any(first in json.loads(line)['text'] for line in open(f'{experiment}/articles.jsonl'))
    for name in ('words', 'clusters', 'maps', 'probe', 'loss'):
        assert os.path.getsize(f'{experiment}/out/wiki_small/figures/{name}.png') > 5000
    report = open(f'{experiment}/out/wiki_small/summary.md').read()
    assert '## What the most topical heads read' in report and 'words.png' in report

def test_published_holds_no_text(experiment):
    """Nothing from which a row could be read: no words, no tokens in running order, under no name."""
    place, out = f'{experiment}/results/wiki_small', f'{experiment}/out/wiki_small'
    words = json.load(open(f'{out}/mha_shuffled_rope/seed0/analysis.json'))['words']
    strip = json.load(open(f'{out}/mha_shuffled_rope/seed0/lens.json'))['strip']
    lenses, analyses = (glob.glob(f'{place}/**/{name}.json', recursive=True) for name in ('lens', 'analysis'))
    assert len(lenses) == len(analyses) == 6 and strip['tokens'] and len(words['tokens']) == 96
    strips = [json.load(open(path))['strip'] for path in lenses]
    assert all(s['tokens'] is s['target'] is None and len(s['topics']) == len(strip['topics']) for s in strips)
    assert all(json.load(open(path))['words'] is None for path in analyses)
    assert not os.path.exists(f'{place}/figures/words.png') and 'words.png' not in open(f'{place}/summary.md').read()
    squeeze = lambda text: ''.join(text.split())
    traces = [squeeze(json.dumps(words['tokens'][:12])[1:-1]), squeeze(json.dumps(strip['tokens'][:12])[1:-1]),
              squeeze(''.join(words['tokens'][:12]))]
    texts = [squeeze(open(path, encoding='utf-8').read()) for path in glob.glob(f'{place}/**/*', recursive=True)
             if os.path.isfile(path) and not path.endswith('.png')]
    assert texts and not any(trace in text for trace in traces for text in texts)
    own = squeeze(open(f'{out}/mha_shuffled_rope/seed0/analysis.json', encoding='utf-8').read())
    assert traces[0] in own                                                     # the search finds what is there

def test_published_figures_can_be_drawn_again(experiment, tmp_path):
    """All but the words: what is left out of published JSON is what no figure shows."""
    drawn, published = drawn_again(f'{experiment}/results/wiki_small', tmp_path)
    assert 'strip.png' in drawn and drawn == published

def test_what_heads_read(experiment):
    """The table of `reading`, for the most topical head, summed pair by pair."""
    folder = f'{experiment}/out/wiki_small/mha_shuffled_rope/seed0'
    attends = json.load(open(f'{folder}/analysis.json'))['attends']
    from tokenizers import Tokenizer
    from model import load
    decode = Tokenizer.from_file(f'{experiment}/data/wiki_small/tokenizer.json').decode
    model, data, head = load(folder), shards.read(f'{experiment}/data/wiki_small'), attends[0]
    x, z = (torch.from_numpy(a[6:12, :-1].astype(np.int64)) for a in (data.val, data.val_topics))    # the other half
    with torch.no_grad():
        pattern = [p for _, p in model.trace(x) if p is not None][head['layer']][:, head['head']].double()
    mass, chance, count = np.zeros(400), np.zeros(400), np.bincount(x.flatten(), minlength=400)
    same = same_chance = 0.0
    for row in range(6):
        for t in range(96):
            for s in range(1, t - 15):
                a, u, key = pattern[row, t, s].item(), 1 / (t + 1), x[row, s].item()
                mass[key], chance[key] = mass[key] + a, chance[key] + u
                if z[row, t] == z[row, s]:
                    same, same_chance = same + a, same_chance + u
    assert head['same'] == pytest.approx(same / mass.sum(), rel=1e-3)
    assert head['same_uniform'] == pytest.approx(same_chance / chance.sum(), rel=1e-3)
    ratio = np.divide(mass / mass.sum(), chance / chance.sum(), out=np.zeros(400), where=chance > 0)
    ratio[count < 5] = 0
    expected = [[decode([int(j)]), ratio[j]] for j in np.argsort(-ratio)[:12] if ratio[j] > 0]
    assert sorted(r for _, r in head['tokens']) == pytest.approx(sorted(r for _, r in expected), rel=1e-3)
    assert len({t for t, _ in head['tokens']} & {t for t, _ in expected}) >= 11          # but for ties

def test_sample(experiment):
    at = '--run=out/wiki_small/mha_shuffled_rope/seed0'
    first, again, other = (run('sample.py', at, '--prompt=abc', '--n_tokens=9', '--n_samples=2', f'--seed={s}',
                               cwd=experiment) for s in (0, 0, 1))
    assert first.returncode == 0 and first.stdout == again.stdout != other.stdout
    assert first.stdout.count('--- ') == 2 and '\nabc' in first.stdout
    done = run('sample.py', '--run=out/nothing', cwd=experiment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    done = run('sample.py', at, '--prompt=', cwd=experiment)
    assert done.returncode == 1 and 'prompt is empty' in done.stderr
    done = run('sample.py', at, '--prompt=abc', '--n_tokens=5', '--temperature=1e-40', cwd=experiment)
    likeliest = run('sample.py', at, '--prompt=abc', '--n_tokens=5', '--temperature=0', cwd=experiment)
    assert done.returncode == 0 and done.stdout == likeliest.stdout
    meta = f'{experiment}/data/wiki_small/meta.json'                            # made again, with another tokenizer
    before = open(meta).read()
    open(meta, 'w').write(before.replace(json.loads(before)['files']['train.bin']['sha256'], 'f' * 64))
    done = run('sample.py', at, cwd=experiment)
    open(meta, 'w').write(before)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'another dataset' in done.stderr

# -----------------------------------------------------------------------------
# the real thing

@pytest.mark.skipif(not (os.environ.get('WIKI_ARTICLES') and os.environ.get('MINILM_PATH')), reason='WIKI_ARTICLES (a '
                    'parquet or jsonl file of articles) and MINILM_PATH (a folder of all-MiniLM-L6-v2) are not set')
def test_real(tmp_path):
    """1,000 real articles and the real embedder: topics that a second seed finds too, nearly all tokens used."""
    cfg = configure(prepare_wiki.__file__, [
        f'--source={os.environ["WIKI_ARTICLES"]}', f'--embedder={os.environ["MINILM_PATH"]}', '--max_articles=1000',
        '--n_topics=8', '--vocab_size=2048', '--block_size=256', '--min_segment_len=32', '--val_share=0.1',
        f'--data_dir={tmp_path}/data', f'--work_dir={tmp_path}/work'])
    prepare_wiki.main(cfg)
    corpus = shards.read_meta(str(tmp_path / 'data'))['corpus']
    assert corpus['articles'] == 1000 and min(corpus['topics']['ami']) > 0.4
    assert corpus['topics']['largest_share'] < 0.4
    assert corpus['tokens']['train']['used'] > 0.95 * corpus['tokens']['train']['tokens']
