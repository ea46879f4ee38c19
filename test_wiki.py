"""Wikipedia: cleaning, splitting, packing, restarting, bad input, and the whole chain on articles made here."""
import errno
import filecmp
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

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
from test_train import ENV, HERE, run

SMALL = ['--embedder=lsa', '--n_topics=3', '--vocab_size=400', '--block_size=96', '--min_segment_len=16',
         '--val_share=0.2', '--min_chars=100']

def write(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)

def numbered(texts):
    return [{'id': i, 'url': '', 'title': f'Article {i}', 'text': text} for i, text in enumerate(texts)]

def make_texts(n=90, seed=0, letters='abcdefghijklmnoprstu', space=' '):
    """n texts in three made-up languages, and which."""
    rng = np.random.default_rng(seed)
    def words(count):
        return [''.join(rng.choice(list(letters), rng.integers(3, 8))) for _ in range(count)]
    common, own, topics = words(20), [words(60) for _ in range(3)], rng.integers(3, size=n)
    return [space.join(rng.choice(own[k]) if rng.random() < 0.7 else rng.choice(common)
                       for _ in range(rng.integers(40, 200))) for k in topics], topics

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
    """The folder of articles, work and a dataset made here: 90, a duplicate, one with the same opening, two stubs."""
    tmp = tmp_path_factory.mktemp('wiki')
    texts, _ = make_texts()
    write(tmp / 'articles.jsonl', numbered([*texts, texts[0].upper(), texts[0] + ' x', 'short', None]))
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
    rows = list(prepare_wiki.pack(rng, lengths, labels, 257, low, high, 24))
    used = [np.zeros(n, int) for n in lengths]
    for row in rows:
        articles, _, sizes = zip(*row)
        assert sum(sizes) == 257 and low <= len(row) <= high and min(sizes) >= 24
        assert (np.diff(labels[list(articles)].astype(int)) != 0).all() and len(set(articles)) == len(row)
        for article, start, size in row:
            assert start + size <= lengths[article]
            used[article][start:start + size] += 1
    flat = np.concatenate(used)
    assert flat.max() == 1 and flat.mean() >= 0.975                            # each token at most once
    share = np.bincount(labels, [u.sum() for u in used]) / flat.sum()
    assert np.abs(share - np.bincount(labels, lengths) / lengths.sum()).max() < 0.03       # topics as their tokens
    counts = np.bincount([len(row) for row in rows])[low:] / len(rows)
    assert np.abs(counts - 1 / (high - low + 1)).max() < 0.06                  # every number of segments alike
    assert not list(prepare_wiki.pack(rng, np.full(20, 300), np.zeros(20, int), 257, 2, 4, 24))      # it gives up

# -----------------------------------------------------------------------------
# cleaning

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

def test_long_word(tmp_path):
    """So is a word of a megabyte tokenized, in which merges take the square of its length."""
    texts, _ = make_texts()
    texts[0] = texts[0] + ' ' + 'tagc' * 250_000
    write(tmp_path / 'articles.jsonl', numbered(texts))
    clock = time.process_time()
    make(tmp_path)
    assert time.process_time() - clock < 20

def test_words():
    words, _ = prepare_wiki.tf_idf(['The विद्यालय, पुस्तकें 1990 Été_x is an ox'] + 2 * ['none'])
    assert set(words.get_feature_names_out()) == {'विद्यालय', 'पुस्तकें', 'été'}

# -----------------------------------------------------------------------------
# a dataset

def test_scripts(tmp_path):
    """Words of any script with spaces; without them lsa, which lives on words, says so."""
    write(tmp_path / 'articles.jsonl', numbered(make_texts(letters='山水火木金土日月人口手足目耳心', space='')[0]))
    with pytest.raises(SystemExit, match='lsa.*without spaces'):
        make(tmp_path)
    texts, truth = make_texts(letters='कखगघचछजझटठडढणतथदधनपफबभमयरलव')
    write(tmp_path / 'articles.jsonl', numbered(texts))
    make(tmp_path)
    labels = prepare_wiki.read_topics(f'{tmp_path}/data')['labels']
    assert adjusted_mutual_info_score(labels, truth) > 0.9

def test_dataset(made):
    data, meta = shards.read(f'{made}/data'), shards.read_meta(f'{made}/data')
    corpus, (texts, truth) = meta['corpus'], make_texts()
    assert data.train.shape[1] == 97 and meta['kind'] == 'wiki' and meta['cleaning'] == prepare_wiki.CLEANING
    assert corpus['articles'] == 90 and len(corpus['val_ids']) == 18
    labels = prepare_wiki.read_topics(f'{made}/data')['labels']
    assert adjusted_mutual_info_score(labels, truth) > 0.9                     # the clusters are the languages
    page = open(f'{made}/data/topics.md', encoding='utf-8').read()
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

def test_tokenizer_has_not_seen_validation(tmp_path):
    """A word that is frequent in validation articles alone is no token; in training articles alone it is one."""
    texts, _ = make_texts()
    val = np.random.default_rng([0, 0]).permutation(90)[:18]                   # as prepare_wiki.py splits them
    for i in range(90):
        texts[i] += (' xyzzyv' if i in val else ' xyzzyt') * 30
    write(tmp_path / 'articles.jsonl', numbered(texts))
    make(tmp_path)
    assert set(shards.read_meta(f'{tmp_path}/data')['corpus']['val_ids']) == set(map(str, val))
    encode = Tokenizer.from_file(f'{tmp_path}/data/tokenizer.json').encode
    assert len(encode(' xyzzyt').ids) == 1 and len(encode(' xyzzyv').ids) > 1

# -----------------------------------------------------------------------------
# done, stopped, killed

def test_done(made, tmp_path, monkeypatch):
    """What is done is skipped, and what other parameters leave as it is reused; what others left is not touched."""
    tmp = shutil.copytree(made, tmp_path / 'copy')
    with monkeypatch.context() as patch:
        for name in ('clean', 'lsa'):
            patch.setattr(prepare_wiki, name, None)                            # would be a TypeError
        make(tmp)                                                              # the dataset is there
        make(tmp, '--n_topics=2', f'--data_dir={tmp}/two')
    with pytest.raises(SystemExit, match='built with other parameters.*n_topics is 3 there, 2 here'):
        make(tmp, '--n_topics=2')
    monkeypatch.setattr(prepare_wiki, 'CLEANING', 99)
    with pytest.raises(SystemExit, match='built with other parameters.*cleaning'):
        make(tmp)
    monkeypatch.undo()

    shutil.rmtree(tmp / 'data')
    strange = []
    for folder in glob.glob(f'{tmp}/work/*/'):
        os.remove(f'{folder}/done.json')
        strange += [f'{folder}/{name}' for name in ('00000.npy.7.tmp.npy', '00000.lines.7.tmp', '0.lines')]
    for path in strange:
        open(path, 'w').write('cut {')
    make(tmp)
    assert same(made / 'data', tmp / 'data') and all(map(os.path.exists, strange))
    write(tmp / 'articles.jsonl', numbered(make_texts(seed=1)[0]))             # others of that name
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

def make_by_letters(tmp, *flags):
    """In small chunks."""
    sys.modules['sentence_transformers'] = types.SimpleNamespace(SentenceTransformer=Letters)
    prepare_wiki.CHUNK, prepare_wiki.PART = 40, 30
    make(tmp, '--embedder=letters', *flags)

def kill_everywhere(tmp):
    """Makes a dataset in children, of which each kills itself (-9) before a file gets a name that none had come to,
    until one ends. tmp/log has a line for each article cleaned and for each file that was to get its name."""
    real, article = os.replace, prepare_wiki.article
    def tell(line):
        with open(f'{tmp}/log', 'a+') as f:
            f.seek(0)
            told = f'{line}\n' in f.readlines()
            f.write(f'{line}\n')
        return told
    def replace(temporary, path):
        if not tell(re.sub(r'tmp-\d+', 'tmp', path)):
            os.kill(os.getpid(), signal.SIGKILL)
        real(temporary, path)
    def counted(record):
        tell('article')
        return article(record)
    os.replace, prepare_wiki.article = replace, counted
    for _ in range(60):
        child = os.fork()
        if not child:
            make_by_letters(tmp)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break

def test_killed_anywhere(fresh):
    """What kill -9 loses is one chunk of articles, vectors, tokens or rows: each is worked out once more, not twice."""
    calls = f"""import test_wiki
test_wiki.make_by_letters('{fresh}', '--data_dir={fresh}/whole', '--work_dir={fresh}/whole_work')
test_wiki.kill_everywhere('{fresh}')"""
    # in a process of its own, which forks: without threads
    env = ENV | {'TOKENIZERS_PARALLELISM': 'false'}
    done = subprocess.run([sys.executable, '-c', calls], cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(fresh / 'data', fresh / 'whole')
    log = open(fresh / 'log').read().splitlines()
    arrays = [line for line in log if line.endswith('.npy')]
    assert log.count('article') == 2 * 94 and len(set(arrays)) == 3 + 3 + 4 and len(arrays) == 2 * len(set(arrays))

def test_held_up(fresh, monkeypatch):
    """By a run at work in the same folder, or by a full disk: one line, and the same command goes on."""
    with runs.locked(fresh / 'work'):
        refused('another process is at work there', fresh)
    replace = os.replace
    def full(temporary, path):
        if path.endswith('.npy'):
            raise OSError(errno.ENOSPC, 'No space left on device', path)
        replace(temporary, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', full)
        refused('cannot be written (No space left on device)', fresh)
    make(fresh)

def test_topics_from(made, fresh, monkeypatch):
    """The topics of another run, without its vectors: the same to the byte; of other articles: refused."""
    os.mkdir(fresh / 'published')
    for name in ('clusters.json', 'topics.md'):                                # what results/ keeps of a dataset
        shutil.copy(made / 'data' / name, fresh / 'published')
    flag = f'--topics_from={fresh}/published'
    with monkeypatch.context() as patch:
        patch.setattr(prepare_wiki, 'vectors', None)                           # would be an AttributeError
        make(fresh, flag)
    assert same(made / 'data', fresh / 'data')
    shutil.rmtree(fresh / 'data')
    refused('has 3 topics of 90 other articles, not n_topics = 2 of these 90', fresh, flag, '--n_topics=2')
    refused('no topics there', fresh, f'--topics_from={fresh}')
    refused('of 90 other articles, not n_topics = 3 of these 89', fresh, flag, '--max_articles=89')

# -----------------------------------------------------------------------------
# sources

def test_local_sources(made, fresh):
    """The same articles as parquet, as jsonl with a byte order mark, in a folder beside the work."""
    rows = [json.loads(line) for line in open(fresh / 'articles.jsonl')]
    for folder in ('a', 'b[1]'):
        os.mkdir(fresh / folder)
    pq.write_table(pa.Table.from_pylist(rows[:50]), fresh / 'a/1.parquet', row_group_size=20)
    pq.write_table(pa.Table.from_pylist(rows[50:]), fresh / 'a/2.parquet')
    (fresh / 'b[1]/x[1].jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8-sig')
    for folder in glob.glob(f'{made}/work/articles-*'):                        # what it wrote itself is no source
        shutil.copytree(folder, fresh / 'a' / os.path.basename(folder))
        write(fresh / 'a' / os.path.basename(folder) / '00001.lines', numbered(make_texts(seed=5)[0]))
    for number, source in enumerate(['a/*.parquet', 'b[1]/x[1].jsonl', 'a']):
        to = f'{fresh}/a/{number}'
        make(fresh, f'--source={fresh}/{source}', f'--data_dir={to}/data', f'--work_dir={to}/work')
        assert same(made / 'data', f'{to}/data', 'train.bin')

def test_hub(tmp_path, monkeypatch):
    """Of a dataset of the hub a sample: files and row groups in an order drawn from the seed, no file that is not
    needed; when the network goes away, the same command goes on."""
    rows, asked = numbered(make_texts()[0]), []
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(rows[30 * i:30 * i + 30]), tmp_path / f'{i}.parquet', row_group_size=5)
    def download(repo, name, repo_type):
        asked.append(name)
        if len(asked) == 2:
            raise ConnectionError('the network is gone')
        return f'{tmp_path}/{os.path.basename(name)}'
    names = ['README.md', 'en/2.parquet', 'en/0.parquet', 'de/0.parquet', 'en/1.parquet']
    hub = types.SimpleNamespace(list_repo_files=lambda *_, **__: names, hf_hub_download=download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    monkeypatch.setattr(prepare_wiki, 'CHUNK', 20)
    def ids(seed, folder):
        make(tmp_path, '--source=some/articles', '--subset=en', '--max_articles=45', f'--seed={seed}',
             f'--data_dir={tmp_path}/{folder}', f'--work_dir={tmp_path}/{folder}_work')
        some = prepare_wiki.read_all(glob.glob(f'{tmp_path}/{folder}_work/articles-*')[0])
        return [int(a['id']) for a in some]
    with pytest.raises(SystemExit, match='the network is gone.*the same command goes on'):
        ids(0, 'a')
    first = ids(0, 'a')
    assert asked[2:] == [f'en/{i}.parquet' for i in dict.fromkeys(i // 30 for i in first)] and len(asked) == 4
    assert len(set(first)) == 45 and first[:30] != sorted(first[:30]) and first[4] == first[0] + 4
    assert first == ids(0, 'b') != ids(1, 'c')

def test_no_network(tmp_path):
    """The hub, out of reach, told by its own variable (without it the libraries try again for some 30 s first)."""
    done = run('prepare_wiki.py', f'--work_dir={tmp_path}/work', f'--data_dir={tmp_path}/data',
               env={'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert done.returncode == 1 and not os.path.exists(tmp_path / 'data') and 'Traceback' not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('wikimedia/wikipedia: cannot be read')

# -----------------------------------------------------------------------------
# bad input

SAME = [{'id': i, 'title': 'x', 'text': ' '.join(np.roll(make_texts(3)[0][i % 3].split(), i))} for i in range(30)]

@pytest.mark.parametrize('content, match', [
    (b'', '0 articles after cleaning are too few for n_topics = 6'),
    (b'{"id": 1, "title"', 'x.jsonl: cannot be read (JSONDecodeError'),
    (b'{"id": 1, "title": "\xe9", "text": "x"}', 'x.jsonl: cannot be read (UnicodeDecodeError'),
    (b'{"id": 1, "title": "t"}', "x.jsonl: cannot be read (KeyError: 'text'; row 1)"),
    (b'\n[]', 'x.jsonl: cannot be read (TypeError'), (b'{"id": 7, "title": "t", "text": 5}', '0 articles'),
    ([{'id': i, 'title': 'word', 'text': 'word ' * (40 + i)} for i in range(9)], "embedder = 'lsa': of no use here"),
    (SAME, 'n_topics = 6: the articles fall into fewer clusters')])
def test_bad_lines(content, match, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / 'x.jsonl').write_bytes(content)
    else:
        write(tmp_path / 'x.jsonl', content)
    refused(match, tmp_path, f'--source={tmp_path}/x.jsonl', '--n_topics=6')

def test_bad_files(tmp_path):
    refused('nothing/here/at/all: cannot be read', tmp_path, '--source=nothing/here/at/all')
    pq.write_table(pa.table({'id': ['1'], 'body': ['x']}), tmp_path / 'x.parquet')
    refused("x.parquet: cannot be read (KeyError: 'title'", tmp_path, f'--source={tmp_path}/x.parquet')
    (tmp_path / 'cut.parquet').write_bytes((tmp_path / 'x.parquet').read_bytes()[:-40])
    refused('cut.parquet: cannot be read', tmp_path, f'--source={tmp_path}/cut.parquet')

@pytest.mark.parametrize('flag, match', [
    ('embedder=./no_model', 'of no use here'), ('min_segment_len=60', 'what fits 4 times in 97 tokens'),
    ('vocab_size=65536', 'not in [257, 65535]'), ('n_topics=256', 'not in [2, 255]'),
    ('val_share=1.0', 'not in (0, 1)'),
    ('max_segments=1', 'max_segments = 1'), ('min_segments=5', 'min_segments = 5, max_segments = 4'),
    ('val_share=0.001', 'val_share = 0.001'), ('val_share=0.999', 'val_share = 0.999'), ('block_size=9000', 'one row')])
def test_bad_settings(flag, match, fresh):
    refused(match, fresh, f'--{flag}')

def test_unstable_topics(tmp_path, capsys):
    """Articles without topics: each seed finds others, which is told on the screen and in topics.md."""
    rng = np.random.default_rng(0)
    words = [''.join(word) for word in rng.choice(list('abcdefghijklmnoprstu'), (400, 6))]
    write(tmp_path / 'articles.jsonl', numbered(' '.join(rng.choice(words, 80)) for _ in range(90)))
    make(tmp_path)
    for text in (capsys.readouterr().out, (tmp_path / 'data/topics.md').read_text()):
        assert 'WARNING: another seed does not find these topics' in text

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
    for name in ('loss', 'order', 'maps', 'probe', 'effects', 'lens'):
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
    topics, data = prepare_wiki.read_topics(f'{tmp_path}/data'), shards.read(f'{tmp_path}/data')
    assert len(topics['labels']) == 1000 and topics['ami'] > 0.4 and np.bincount(topics['labels']).max() < 400
    assert data.train.size + data.val.size > 0.95 * data.meta['corpus']['tokens']
