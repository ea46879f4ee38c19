"""Wikipedia: cleaning, splitting, packing, restarting, bad input, and the whole chain on articles made here."""
import filecmp
import glob
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_mutual_info_score as ami
from tokenizers import Tokenizer

import prepare_wiki
import runs
import shards
from configurator import configure
from test_train import HERE, refuses, run, spawn, succeeds

SMALL = ['--embedder=lsa', '--n_topics=3', '--vocab_size=400', '--block_size=96', '--min_segment_len=16',
         '--val_share=0.2', '--min_chars=100']

def numbered(texts):
    return [{'id': i, 'url': '', 'title': f'Article {i}', 'text': text} for i, text in enumerate(texts)]

def write(tmp, texts):
    (tmp / 'articles.jsonl').write_text('\n'.join(map(json.dumps, numbered(texts))))

def make_texts(n=90, seed=0, letters='abcdefghijklmnoprstu', space=' '):
    """n texts in three made-up languages, and which."""
    rng = np.random.default_rng(seed)
    words = np.array([''.join(rng.choice(list(letters), rng.integers(3, 8))) for _ in range(200)])
    topics = rng.integers(3, size=n)                                           # of 60 words, and 20 of all
    def text(k, m):
        own, common = words[60 * k + rng.integers(60, size=m)], words[rng.integers(180, 200, m)]
        return space.join(np.where(rng.random(m) < 0.7, own, common))
    return [text(k, m) for k, m in zip(topics, rng.integers(40, 200, n))], topics

def make(tmp, *flags):
    return prepare_wiki.main(configure(prepare_wiki.__file__, [
        f'--source={tmp}/articles.jsonl', f'--data_dir={tmp}/data', f'--work_dir={tmp}/work', *SMALL, *flags]))

def refused(match, tmp, *flags):
    """The one line with which the stage stops, before there is a dataset."""
    with pytest.raises(SystemExit, match=rf'\A.*{re.escape(match)}.*\Z'):
        make(tmp, *flags)
    assert not os.path.exists(f'{tmp}/data')

def same(a, b, *names):
    return filecmp.cmpfiles(a, b, names or os.listdir(a), shallow=False)[1:] == ([], [])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The folder of articles, work and a dataset made here: 90, a duplicate, one with the same opening, two stubs."""
    tmp, (texts, _) = tmp_path_factory.mktemp('wiki'), make_texts()
    write(tmp, [*texts, texts[0].upper(), texts[0] + ' x', 'short', None])
    make(tmp)
    return tmp

@pytest.fixture
def fresh(made, tmp_path):
    shutil.copy(made / 'articles.jsonl', tmp_path)
    return tmp_path

@pytest.mark.parametrize('low, high', [(2, 4), (1, 3)])
def test_pack(low, high):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6, 1, 800).astype(int) + 5, 9000)       # as uneven as Wikipedia's
    labels = rng.choice(4, 800, p=[.1, .2, .25, .45]).astype(np.uint8)
    used, counts = np.zeros(800, int), np.zeros(5)
    for row in prepare_wiki.pack(rng, lengths, labels, 257, low, high, 24):
        articles, starts, sizes = (np.array(x) for x in zip(*row))
        assert sum(sizes) == 257 and low <= len(row) <= high and min(sizes) >= 24 and len(set(articles)) == len(row)
        assert np.diff(labels[articles].astype(int)).all() and (starts == used[articles]).all()       # no token twice
        used[articles] += sizes
        counts[len(row)] += 1
    assert (used <= lengths).all() and used.sum() >= 0.975 * lengths.sum()
    share = np.bincount(labels, used) / used.sum()
    assert np.abs(share - np.bincount(labels, lengths) / lengths.sum()).max() < 0.03       # topics as their tokens
    assert np.ptp(counts[low:high + 1]) < 0.1 * counts.sum()                   # every number of segments alike
    assert not list(prepare_wiki.pack(rng, np.full(20, 300), np.zeros(20, int), 257, 2, 4, 24))      # it gives up

BODY = 'The river rises in the hills and runs to the sea, past four towns and a great many mills, for it is a long ' \
       'river and a slow one, and nobody has ever been in a hurry there.'

@pytest.mark.parametrize('text, kept', [
    ('if q<i and j>3, or 2 < n and m > 1; A --> B', 'if q<i and j>3, or 2 < n and m > 1; A --> B'),
    ('a<br />b<i class="x">c</i> <ref name=Smith 2009>note [[x]]</ref><ref name="k"/>d<!-- {{e}} --><img alt=">"/>',
     'a bc d'),
    ("'''B''' is ''i'', 5' 11'' tall and 6' 2'' wide", "B is i, 5' 11'' tall and 6' 2'' wide"),
    ('a {{b|{{c|{{{1|{{d}}}}}}}|e}} f {{{g}}} h }} i {{ j', 'a f h i j'),
    ('a\n{| class="w"\n! b\n|-\n| c\n{|\n| d\n|}\n|}\ne |x| f', 'a\n\ne |x| f'),
    ('2&nbsp;m &amp;lt;b&gt;c&lt;/b&gt; AT&T &c; R&#233;', '2 m c AT&T &c; Ré'),
    ('[[Lake|lakes]] [[Sea]] [[Datei:a b.JPG|mini|an [[Ox|oxen]] x]][[Category:Z]]y [http://u.v w]', 'lakes Sea y w'),
    ('== Head ==\n* item\n# one\n__TOC__ formula_12 __init__', 'Head\nitem\none\n__init__'),
    ('so\u00adft ze\u200bro \ufeffw\u2060j \u200eltr a\u200db \ud800', 'soft zero wj ltr ab'),
    ('می\u200cخواهم क्\u200dष 👩\u200d💻', 'می\u200cخواهم क्\u200dष 👩\u200d💻'),
    ('e\u0301 \t \x0bx\r\n \n\n\n\ny', 'é x\n\ny'),
    (f'{BODY}\nReferences\nA. Smith, Mills\n\nExternal links\n* {BODY}', BODY),
    (f'{BODY}\nNotes:\nIt is so.\n{BODY}', f'{BODY}\nNotes:\nIt is so.\n{BODY}'),
    (f'{BODY}\nNotes\nIt is so.', f'{BODY}\nNotes\nIt is so.')])
def test_clean(text, kept):
    assert prepare_wiki.clean(text) == kept

@pytest.mark.parametrize('start, unit', [
    *(('', unit) for unit in ('{{', '}}', '<', '<b ', '<ref>', '[[', '{|\n', '<!--', 'a', ' ', '\n', "''a", '&',
                              'Notes\n', '\u0301\u0323', '<b a="', '[[a|', '[[a.jpg', '{{a}}', '<ref>a</ref>')),
    ('[//', 'a'), ('[[', 'a|'), ('<b', ' '), ('<b a="', "b='"), ("''", "a'b"), ('=', '='), ('{|', '\n|'),
    ('References\n', '* item\n')])
def test_linear(start, unit):
    """A megabyte of anything is cleaned in seconds; a pattern that is not linear takes hours."""
    clock = time.process_time()
    prepare_wiki.clean(start + unit * (10**6 // len(unit)) + '\n' + BODY)
    assert time.process_time() - clock < 10

def test_scripts(tmp_path):
    """Words of any script with spaces; without them lsa says so."""
    words, _ = prepare_wiki.tf_idf(['The विद्यालय, पुस्तकें 1990 Été_x is an ox', 'none', 'none'])
    assert set(words.get_feature_names_out()) == {'विद्यालय', 'पुस्तकें', 'été'}
    write(tmp_path, make_texts(letters='山水火木金土日月人口手足目耳心', space='')[0])
    refused('without spaces', tmp_path)
    texts, truth = make_texts(letters='कखगघचछजझटठडढणतथदधनपफबभमयरलव')
    write(tmp_path, texts)
    make(tmp_path)
    assert ami(prepare_wiki.read_topics(f'{tmp_path}/data')['labels'], truth) > 0.9

def test_unstable_topics(tmp_path, capsys):
    """Articles without topics: each seed finds others, which is told on the screen and in topics.md."""
    rng = np.random.default_rng(0)
    write(tmp_path, [' '.join(rng.choice(' '.join(make_texts()[0]).split(), 80)) for _ in range(90)])
    make(tmp_path)
    for text in (capsys.readouterr().out, (tmp_path / 'data/topics.md').read_text()):
        assert 'WARNING: another seed does not find these topics' in text

def test_dataset(made):
    data, meta = shards.read(f'{made}/data'), shards.read_meta(f'{made}/data')
    corpus, (texts, truth) = meta['corpus'], make_texts()
    assert data.train.shape[1] == 97 and corpus['articles'] == 90 and len(corpus['val_ids']) == 18
    labels = prepare_wiki.read_topics(f'{made}/data')['labels']
    assert ami(labels, truth) > 0.9                                            # the clusters are the languages
    page = (made / 'data/topics.md').read_text(encoding='utf-8')
    assert 'Rand index 1.00, adjusted mutual information 1.00' in page and 'WARNING' not in page
    for k, line in enumerate(re.findall('Words: (.*)', page)):                 # fifteen words of this language alone
        of = [{k for text, k in zip(texts, labels) if word in text.split()} for word in line.split(', ')]
        assert of == 15 * [{k}]
    assert 0.95 < (data.train.size + data.val.size) / corpus['tokens'] <= 1
    # every piece is text of an article of its own split and topic, and no article is in both, no text twice
    tokenizer, seen = Tokenizer.from_file(f'{made}/data/tokenizer.json'), set()
    for split in ('train', 'val'):
        tokens, z = getattr(data, split), getattr(data, f'{split}_topics')
        mine = [i for i in range(90) if (str(i) in corpus['val_ids']) == (split == 'val')]
        for row, topic in zip(tokens[:20], z[:20]):
            for piece in np.split(np.arange(97), np.flatnonzero(np.diff(topic.astype(int))) + 1):
                text = tokenizer.decode(row[piece].tolist())
                assert {labels[i] for i in mine if text in texts[i]} == {topic[piece[0]]} and text[:20] not in seen
                seen.add(text[:20])
    # whatever the text, decoding gives it back: every code point in a sample, controls and emoji included
    points = np.random.default_rng(0).integers(0, 0x110000, 4000)
    text = ''.join(chr(p) for p in [*points, *range(300)] if not 0xD800 <= p < 0xE000) + ' \n\t  ǆ '
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and max(ids) < 400

def test_tokenizer(tmp_path):
    """Of words that are frequent in one split alone, that of training is a token; one of a megabyte takes seconds."""
    texts, _ = make_texts()
    val = np.random.default_rng([0, 0]).permutation(90)[:18]                   # as prepare_wiki.py splits them
    texts = [text + (' xyzzyv' if i in val else ' xyzzyt') * 30 for i, text in enumerate(texts)]
    write(tmp_path, [*texts[:-1], texts[-1] + ' ' + 'tagc' * 250_000])
    clock = time.process_time()
    make(tmp_path)
    assert time.process_time() - clock < 20
    assert set(shards.read_meta(f'{tmp_path}/data')['corpus']['val_ids']) == set(map(str, val))
    encode = Tokenizer.from_file(f'{tmp_path}/data/tokenizer.json').encode
    assert len(encode(' xyzzyt').ids) == 1 and len(encode(' xyzzyv').ids) > 1

def test_done(made, tmp_path):
    """What is done is skipped, and what other parameters leave as it is reused; what others left is not touched."""
    tmp = shutil.copytree(made, tmp_path / 'copy')
    with patch.multiple(prepare_wiki, clean=None, lsa=None):                   # would be a TypeError
        make(tmp)                                                              # the dataset is there
        make(tmp, '--n_topics=2', f'--data_dir={tmp}/two')
    differ = 'other parameters.*n_topics is 3 there, 2 here.*cleaning is 2 there, 99'
    with patch.object(prepare_wiki, 'CLEANING', 99), pytest.raises(SystemExit, match=differ):
        make(tmp, '--n_topics=2')
    shutil.rmtree(tmp / 'data')
    strange = []
    for folder in glob.glob(f'{tmp}/work/*/'):
        os.remove(f'{folder}/done.json')
        strange += [f'{folder}/{name}' for name in ('00000.npy.7.tmp.npy', '00000.lines.7.tmp', '0.lines')]
    for path in strange:
        open(path, 'w').write('cut {')
    make(tmp)
    assert same(made / 'data', tmp / 'data') and all(map(os.path.exists, strange))
    write(tmp, make_texts(seed=1)[0])                                          # others of that name
    with pytest.raises(SystemExit, match='built with other parameters.*source_digest'):
        make(tmp)
    os.remove(tmp / 'articles.jsonl')                                          # used where its source is not
    assert make(tmp) == f'{tmp}/data'

class Letters:
    """Counts letters; stands in for SentenceTransformer."""
    def __init__(self, name, device):
        assert name == 'letters' and device is None

    def encode(self, texts):
        assert max(map(len, texts)) <= 620                                     # title and beginning
        return np.array([[t.count(c) for c in 'abcdefghijklmnoprstu'] for t in texts], np.float32)

def kill_everywhere(tmp):
    """Makes a dataset in a child; then another in children, of which each kills itself (-9) before a file gets a name
    that none had come to, until one ends: tmp/log has a line for each article cleaned and each file to be renamed."""
    sys.modules['sentence_transformers'] = types.SimpleNamespace(SentenceTransformer=Letters)
    prepare_wiki.CHUNK, prepare_wiki.PART = 40, 30
    rename, article = os.replace, prepare_wiki.article
    log = open(f'{tmp}/log', 'a+')
    def tell(line):
        log.seek(0)
        told = f'{line}\n' in log.readlines()
        print(line, file=log, flush=True)
        return told
    def replace(temporary, path):
        if not tell(re.sub(r'tmp-\d+', 'tmp', path)):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(temporary, path)
    def in_child(*flags):
        child = os.fork()
        if not child:
            make(tmp, '--embedder=letters', *flags)
            os._exit(0)
        return os.waitpid(child, 0)[1]
    assert in_child(f'--data_dir={tmp}/whole', f'--work_dir={tmp}/whole_work') == 0
    os.replace = os.rename = replace
    prepare_wiki.article = lambda record: [tell('article'), article(record)][1]
    assert any(in_child() == 0 for _ in range(60))

def test_killed_anywhere(fresh):
    """What kill -9 loses is one chunk of articles, vectors, tokens or rows: each is worked out once more, not twice."""
    call = f'import test_wiki; test_wiki.kill_everywhere({str(fresh)!r})'      # in a process that forks: of one thread
    succeeds(spawn([sys.executable, '-c', call], HERE))
    assert same(fresh / 'data', fresh / 'whole')
    assert len(glob.glob(f'{fresh}/data.tmp-*')) == 2      # before meta.json was there, and before the folder's name
    log = open(fresh / 'log').read().splitlines()
    arrays = [line for line in log if line.endswith('.npy')]
    assert log.count('article') == 2 * 94 and len(set(arrays)) == 3 + 3 + 4 and len(arrays) == 2 * len(set(arrays))

def test_topics_from(made, fresh):
    """The topics of another run, without its vectors: the same to the byte; of other articles: refused."""
    os.mkdir(fresh / 'published')
    for name in ('clusters.json', 'topics.md'):                                # what results/ keeps of a dataset
        shutil.copy(made / 'data' / name, fresh / 'published')
    flag = f'--topics_from={fresh}/published'
    refused('has 3 topics of 90 other articles, not n_topics = 2 of these 90', fresh, flag, '--n_topics=2')
    refused('no topics there', fresh, f'--topics_from={fresh}')
    refused('of 90 other articles, not n_topics = 3 of these 89', fresh, flag, '--max_articles=89')
    with patch.object(prepare_wiki, 'vectors', None):                          # would be an AttributeError
        make(fresh, flag, '--embedder=./no_model')
    assert same(made / 'data', fresh / 'data')

def test_local_sources(made, fresh):
    """The same articles as parquet, as jsonl with a byte order mark, in a folder with datasets and work in it."""
    rows = [json.loads(line) for line in open(fresh / 'articles.jsonl')]
    for folder in ('a', 'b[1]'):
        os.mkdir(fresh / folder)
    pq.write_table(pa.Table.from_pylist(rows[:50]), fresh / 'a/1.parquet', row_group_size=20)
    pq.write_table(pa.Table.from_pylist(rows[50:]), fresh / 'a/2.parquet')
    (fresh / 'b[1]/x[1].jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8-sig')
    for number, source in enumerate(['a/*.parquet', 'b[1]/x[1].jsonl', 'a']):
        to = f'{fresh}/a/{number}'
        make(fresh, f'--source={fresh}/{source}', f'--data_dir={to}/data', f'--work_dir={to}/work')
        assert same(made / 'data', f'{to}/data', 'train.bin')

def test_hub(tmp_path, monkeypatch):
    """Files and row groups in an order drawn from the seed, no file that is not needed; the same command goes on."""
    rows, asked = numbered(make_texts()[0]), []
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(rows[30 * i:30 * i + 30]), tmp_path / f'{i}.parquet', row_group_size=5)
    def download(repo, name, repo_type):
        asked.append(name)
        if len(asked) == 2:
            raise ConnectionError('the network is gone')
        return f'{tmp_path}/{os.path.basename(name)}'
    names = lambda *_, **__: ['README.md', 'en/2.parquet', 'en/0.parquet', 'de/0.parquet', 'en/1.parquet']
    hub = types.SimpleNamespace(list_repo_files=names, hf_hub_download=download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 20)
    flags = ['--source=some/articles', '--subset=en', '--max_articles=45']
    def ids(seed, work):
        make(tmp_path, *flags, f'--seed={seed}', f'--data_dir={tmp_path}/{work}_data', f'--work_dir={tmp_path}/{work}')
        return [int(a['id']) for a in prepare_wiki.read_all(*glob.glob(f'{tmp_path}/{work}/articles-*'))]
    refused('the network is gone', tmp_path, *flags, f'--work_dir={tmp_path}/a')
    first = ids(0, 'a')
    assert asked[2:] == [f'en/{i}.parquet' for i in dict.fromkeys(i // 30 for i in first)] and len(asked) == 4
    assert len(set(first)) == 45 and first[:30] != sorted(first[:30]) and first[4] == first[0] + 4
    assert first == ids(0, 'b') != ids(1, 'c')

WORD = [{'id': i, 'title': 'word', 'text': 'word ' * (40 + i)} for i in range(9)]
SAME = [{'id': i, 'title': 'x', 'text': ' '.join(np.roll(make_texts(3)[0][i % 3].split(), i))} for i in range(30)]

@pytest.mark.parametrize('content, match', [
    (b'', '0 articles after cleaning are too few for n_topics = 6'),
    (b'{"id": 1, "title"', 'x.jsonl: cannot be read (JSONDecodeError'),
    (b'{"id": 1, "title": "\xe9", "text": "x"}', 'x.jsonl: cannot be read (UnicodeDecodeError'),
    (b'{"id": 1, "title": "t"}', "x.jsonl: cannot be read (KeyError: 'text'; row 1)"),
    (b'\n[]', 'x.jsonl: cannot be read (TypeError'), (b'{"id": 7, "title": "t", "text": 5}', '0 articles'),
    ('\n'.join(map(json.dumps, WORD)).encode(), "embedder = 'lsa': of no use here"),
    ('\n'.join(map(json.dumps, SAME)).encode(), 'n_topics = 6: the articles fall into fewer clusters')])
def test_bad_lines(content, match, tmp_path):
    (tmp_path / 'x.jsonl').write_bytes(content)
    refused(match, tmp_path, f'--source={tmp_path}/x.jsonl', '--n_topics=6')

def test_bad_files(tmp_path):
    with runs.locked(tmp_path / 'work'):
        refused('another process is at work there', tmp_path)
    refused('x: cannot be written', tmp_path, f'--data_dir={__file__}/x')       # at once: there are no articles
    pq.write_table(pa.table({'id': ['1'], 'body': ['x']}), tmp_path / 'x.parquet')
    refused("x.parquet: cannot be read (KeyError: 'title'", tmp_path, f'--source={tmp_path}/x.parquet')
    (tmp_path / 'cut.parquet').write_bytes((tmp_path / 'x.parquet').read_bytes()[:-40])
    refused('cut.parquet: cannot be read', tmp_path, f'--source={tmp_path}/cut.parquet')

@pytest.mark.parametrize('flag, match', [
    ('source=nowhere/at/all', 'nowhere/at/all: cannot be read'), (f'work_dir={__file__}/x', 'cannot be written'),
    ('embedder=./no_model', 'of no use here'), ('min_segment_len=60', 'what fits 4 times in 97 tokens'),
    ('max_segments=1', 'max_segments = 1'), ('min_segments=5', 'min_segments = 5, max_segments = 4'),
    ('val_share=0.001', 'val_share = 0.001'), ('val_share=0.999', 'val_share = 0.999'), ('block_size=9000', 'one row')])
def test_bad_settings(flag, match, fresh):
    refused(match, fresh, f'--{flag}')

@pytest.fixture(scope='module')
def experiment(made, tmp_path_factory):
    """A folder with config/wiki_small.py, tiny, on articles made here."""
    here = tmp_path_factory.mktemp('experiment')
    shutil.copy(made / 'articles.jsonl', here)
    tiny = ('--n_layer=2 --n_embd=16 --n_head=2 --head_dim=8 --mlp_hidden=24 --batch_size=4 --max_iters=12 --jobs=1 '
            '--eval_interval=6 --eval_rows=12 --analysis_rows=12 --null_draws=20 --publish=True').split()
    config = os.path.join(HERE, 'config', 'wiki_small.py')
    succeeds(run('run_experiment.py', config, '--source=articles.jsonl', *SMALL, *tiny, cwd=here))
    return here

def test_experiment(experiment):
    rows = runs.read_rows(f'{experiment}/out/wiki_small')[1]
    assert len(rows) == 6 and all(r['references']['filter'] is r['gap_closed'] is None for r in rows)
    assert all(0 < r['probe']['references']['running_mean'] <= 1 for r in rows)
    assert len(glob.glob(f'{experiment}/out/wiki_small/figures/*.png')) >= 6
    # nothing is published from which a row could be read: no words and no tokens in running order
    place = f'{experiment}/results/wiki_small'
    assert {'clusters.json', 'topics.md', 'runs.jsonl.xz', 'summary.md'} <= set(os.listdir(place))
    tokenizer = Tokenizer.from_file(f'{experiment}/data/wiki_small/tokenizer.json')
    ids = shards.read(f'{experiment}/data/wiki_small').val[0, :12].tolist()
    texts = [open(path, encoding='utf-8').read() for path in glob.glob(f'{place}/*.*[!z]')]     # .xz: the rows
    texts = [''.join(text.split()) for text in (json.dumps(runs.read_rows(place)), *texts)]
    for trace in (json.dumps(ids)[1:-1], tokenizer.decode(ids)):
        assert len(texts) >= 5 and not any(''.join(trace.split()) in text for text in texts)

def test_sample(experiment):
    flags = '--run=out/wiki_small/mha_shuffled_rope/seed0', '--prompt=abc', '--n_tokens=9', '--n_samples=2'
    def texts(*more):
        return succeeds(run('sample.py', *flags, *more, cwd=experiment)).stdout
    first = texts()
    assert first.count('--- ') == 2 and '\nabc' in first and first == texts() != texts('--seed=1')
    assert texts('--temperature=1e-40') == texts('--temperature=0')
    refuses(run('sample.py', *flags, '--prompt=', cwd=experiment), 'prompt is empty')
    path = f'{experiment}/data/wiki_small/meta.json'
    runs.write_json(path, runs.read_json(path) | {'files': {}})                # as if made again, of other bytes
    for script in ('sample.py', 'drope.py'):
        refuses(run(script, flags[0], cwd=experiment), 'another dataset')

@pytest.mark.skipif(not {'WIKI_ARTICLES', 'MINILM_PATH'} <= {*os.environ}, reason='WIKI_ARTICLES or MINILM_PATH unset')
def test_real(tmp_path):
    """1,000 real articles and the real embedder: topics that a second seed finds too, nearly all tokens used."""
    make(tmp_path, f'--source={os.environ["WIKI_ARTICLES"]}', f'--embedder={os.environ["MINILM_PATH"]}',
         '--max_articles=1000', '--n_topics=8', '--vocab_size=2048', '--block_size=256', '--min_segment_len=32',
         '--val_share=0.1', '--min_chars=500')
    topics, data = prepare_wiki.read_topics(f'{tmp_path}/data'), shards.read(f'{tmp_path}/data')
    assert len(topics['labels']) == 1000 and topics['ami'] > 0.4 and np.bincount(topics['labels']).max() < 400
    assert data.train.size + data.val.size > 0.95 * data.meta['corpus']['tokens']
