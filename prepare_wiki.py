"""
Wikipedia -> topics by meaning -> byte-level BPE -> rows of several topics, in the format of shards.py.

Reads articles: a hub dataset, or parquet or jsonl with id, title and text. Writes the dataset into data_dir, with
tokenizer.json, clusters.json and topics.md, and each phase's work into work_dir.

    python prepare_wiki.py config/wiki.py                                        # downloads: needs the network
    python prepare_wiki.py --source=articles.parquet --embedder=lsa --data_dir=data/my_wiki

Phases: articles (cleaned, without stubs and duplicates), vectors, clusters, tokenizer, tokens, rows. Each works CHUNK
articles at a time and keeps them in work_dir under a name made of what they depend on: what is done is skipped, what
was stopped goes on (clusters, tokenizer and rows begin anew), and another n_topics reuses the vectors. Topics are
labels of all articles; the tokenizer and the training rows come from the training articles alone.

Machines differ in the last digits of vectors, so in a few labels, and then in every row. --topics_from=results/wiki
takes the labels that clusters.json keeps, for the same articles: the same dataset to the byte, without a model.
"""
import atexit
import base64
import bisect
import contextlib
import glob
import hashlib
import html
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from functools import partial

import numpy as np
from tqdm import tqdm

import runs
import shards
from configurator import block, command

# -----------------------------------------------------------------------------
# config

source = 'wikimedia/wikipedia'      # hub dataset, downloaded; or parquet or jsonl: a file, a folder or a glob
subset = '20231101.en'              # of a hub dataset: the folder of its parquet files
max_articles = 500_000              # articles kept, at most [1, 2**31)
min_chars = 500                     # characters; shorter articles are stubs [0, 2**31)
embedder = 'all-MiniLM-L6-v2'       # sentence-transformers model or local folder; lsa = TF-IDF and SVD, offline
embed_tokens = 128                  # of an article that the embedder reads, from its beginning [1, 2**31)
n_topics = 8                        # clusters [2, 255]
topics_from = ''                    # folder with clusters.json and topics.md: the same articles get its topics
vocab_size = 16_384                 # tokens of the byte-level BPE [257, 65535]
block_size = 512                    # predicted tokens in a row; a row on disk has one more [1, 2**31)
val_share = 0.02                    # of the articles: validation (0, 1)
min_segments = 2                    # segments in a training row, uniform from this ... [1, 2**31)
max_segments = 4                    # ... to this; rows of one topic are not made [1, 2**31)
min_segment_len = 64                # tokens in every segment, at least [1, 2**31)
seed = 0                            # of split, clusters, rows, and of the sample of a hub dataset [0, 2**31)
device = ''                         # of the embedder; '' = every GPU, or the CPU
data_dir = 'data/wiki'              # the dataset goes there (--out_dir= says the same)
work_dir = 'data/wiki_work'         # what the phases leave for each other; may be deleted

# -----------------------------------------------------------------------------

CLEANING = 2                # version of clean(): raise it when its rules change, so that no older text is reused
NO_PARAMETERS = ('topics_from', 'device', 'data_dir', 'work_dir')
VAL_SEGMENTS = (2, 4)       # not a knob: validation rows are cut alike in every dataset
CHUNK = 1_000               # records of the source in a file of the work folder: what a stopped phase loses
SAMPLE = 16_000             # articles, evenly spread, that lsa, K-means, the topics' words and the BPE are made from
LSA_CHARS, LSA_DIM = 2_000, 128
# what the phases depend on, of meta.json
ARTICLES = ('source', 'source_digest', 'subset', 'cleaning', 'max_articles', 'min_chars', 'seed')
VECTORS = ARTICLES + ('embedder', 'embedder_digest', 'embed_tokens')
CLUSTERS = VECTORS + ('n_topics',)
TOKENS = ARTICLES + ('vocab_size', 'val_share')

def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it: another value is another dataset. Files and folders by
    their name and a digest, which is left out where they are not here: a dataset may be used elsewhere."""
    meta = {key: getattr(cfg, key) for key in block(__file__) if key not in NO_PARAMETERS}
    for key, files in (('source', source_files(cfg)), ('embedder', files_in(cfg.embedder))):
        meta[key] = os.path.basename(os.path.normpath(meta[key]))
        if files:
            meta[f'{key}_digest'] = fingerprint(files)
    if cfg.topics_from:
        meta |= read_topics(cfg.topics_from)['made_of']
    return meta | {'kind': 'wiki', 'cleaning': CLEANING, 'n_topics': cfg.n_topics}

def files_in(place):
    """The files that a file, a folder or a glob stands for, sorted."""
    pattern = f'{glob.escape(place)}/**' if os.path.isdir(place) else place
    return sorted(filter(os.path.isfile, {place, *glob.glob(pattern, recursive=True)}))

def source_files(cfg):
    """The files of a local source, without what this script writes itself; [] for a dataset of the hub."""
    return [path for path in files_in(cfg.source)
            if path.endswith(('.parquet', '.jsonl')) and not re.search(r'articles-[0-9a-f]{10}.[^/\\]*$', path)]

def fingerprint(files):
    """A digest of the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as f:
            digest.update(os.path.basename(path).encode() + hashlib.file_digest(f, 'sha256').digest())
    return digest.hexdigest()[:16]

def read_topics(folder):
    """clusters.json of a folder, its 'labels' as an array uint8 [articles]."""
    try:
        found = runs.read_json(f'{folder}/clusters.json')
        labels = np.frombuffer(zlib.decompress(base64.b64decode(found['labels'])), np.uint8)
        return found | {'labels': labels, 'n_topics': found['made_of']['n_topics']}
    except (ValueError, KeyError, TypeError, zlib.error) as e:
        raise SystemExit(f'{folder}/clusters.json: no topics there ({reason(e)}); topics_from is a folder with the '
                         'clusters.json and the topics.md of a dataset that prepare_wiki.py has made') from None

def reason(error):
    """The name and the first line of an error."""
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]

def check(cfg):
    """Stops with one line where no row can be cut."""
    row, most = cfg.block_size + 1, max(cfg.max_segments, VAL_SEGMENTS[1])
    if not cfg.min_segments <= cfg.max_segments > 1 or most * cfg.min_segment_len > row:
        raise SystemExit(f'min_segments = {cfg.min_segments}, max_segments = {cfg.max_segments}, min_segment_len = '
                         f'{cfg.min_segment_len}: choose at most max_segments, at least 2, and what fits {most} times '
                         f'in {row} tokens (validation rows have up to {VAL_SEGMENTS[1]} segments)')

# -----------------------------------------------------------------------------
# the work folder

def phase(cfg, meta, keys, work, *inputs):
    """The folder of a phase, named by it and by what it depends on. Unless done.json, its last file, is there,
    work(cfg, folder, *inputs) makes what is missing of its files. Nothing is deleted."""
    params = runs.plain({key: meta.get(key) for key in keys})
    digest = hashlib.sha256(json.dumps(params).encode()).hexdigest()[:10]
    folder = f'{cfg.work_dir}/{work.__name__}-{digest}'
    if not os.path.exists(f'{folder}/done.json'):
        print(folder)
        os.makedirs(folder, exist_ok=True)
        work(cfg, folder, *inputs)
        runs.write_json(f'{folder}/done.json', params)
    return folder

def files_of(folder, suffix):
    """The numbered files of a phase, and nothing else that may lie beside them."""
    return sorted(glob.glob(glob.escape(folder) + '/' + '[0-9]' * 5 + suffix))

def read_file(path):
    """{'id', 'title', 'text', 'hash'} of the articles in a file."""
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]

def read_all(folder):
    """All articles, one after the other."""
    return itertools.chain.from_iterable(map(read_file, files_of(folder, '.jsonl')))

def unmade(folder, source_folder):
    """(articles, path) of every file of articles and of the array that a phase has still to make of it."""
    for source in tqdm(files_of(source_folder, '.jsonl'), os.path.basename(folder), unit='file', disable=None):
        path = f'{folder}/{os.path.basename(source)[:5]}.npy'
        if not os.path.exists(path):
            yield read_file(source), path

def sample(stream, n):
    """SAMPLE of the n articles, or of what belongs to each, evenly spread; all if there are no more."""
    return itertools.islice(stream, 0, None, math.ceil(n / SAMPLE))

# -----------------------------------------------------------------------------
# the source

def hub_files(cfg, order):
    """The parquet files of a hub dataset, in this order; each is downloaded when it is needed, once."""
    import huggingface_hub                                  # only here: nothing else needs it
    names = huggingface_hub.list_repo_files(cfg.source, repo_type='dataset')
    names = sorted(name for name in names if name.endswith('.parquet') and f'/{cfg.subset}/' in f'/{name}')
    for i in order(len(names)):
        yield huggingface_hub.hf_hub_download(cfg.source, names[i], repo_type='dataset')

def read_parquet(path, order):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        groups = [int(i) for i in order(file.num_row_groups)]
        for batch in file.iter_batches(200, groups, ['id', 'title', 'text']):
            yield from batch.to_pylist()

def read_jsonl(path, order):
    with open(path, encoding='utf-8-sig') as f:             # with or without a byte order mark
        yield from (json.loads(line) for line in f if line.strip())

def records(cfg):
    """{'id', 'title', 'text'} of the source: of local files one after the other; of a dataset of the hub a sample, as
    neighbours in a dump are alike: its files, and the row groups in each, in an order drawn from the seed."""
    local = source_files(cfg)
    order = range if local else np.random.default_rng([cfg.seed, 1]).permutation
    place, number = cfg.source, 0
    try:
        for place in local or hub_files(cfg, order):
            read = read_jsonl if place.endswith('.jsonl') else read_parquet
            for number, row in enumerate(read(place, order), 1):
                yield {key: row[key] for key in ('id', 'title', 'text')}
    except Exception as e:                                  # whatever a file or the network may hold
        raise SystemExit(f'{place}: cannot be read ({reason(e)}; row {number}); a source is parquet or UTF-8 jsonl '
                         'with id, title and text, or a dataset of the hub; the same command goes on') from None

# -----------------------------------------------------------------------------
# cleaning: a pattern stops where another of its kind begins, so that the time is linear in the length of a text

def innermost(opening, closing):
    """A pattern of what stands between two marks and holds no other opening."""
    return rf'{opening}(?:(?!{opening})(?s:.))*?{closing}'

FLAGS = re.I | re.M
SIGNS = ''.join(c for c in map(chr, range(0x300, 0x12000)) if unicodedata.category(c)[0] == 'M')   # of a letter before
ENTITY = re.compile(r'&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]\w{1,30});', re.I)
INVISIBLE = re.compile(     # controls, soft hyphen, zero-width space, direction marks, word joiner, BOM, surrogates
    '[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e'
    '\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff]'
    # ZWNJ and ZWJ spell words in Persian and Indic scripts, and join emoji: only after European letters they go
    '|(?<![^\0-\u05ff])[\u200c\u200d]+')
MARKS = ('<', '{', '[', ']]', "''", '==', '_', '\n*', '\n#', '\n:', '\n;')    # without these there is no markup
ATTRIBUTES = r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"<]*"|'[^'<]*'|[^\s"'<>]+))*\s*/?>"""      # and the end of a tag
WHOLE = 'ref|math|chem|gallery|timeline|score|hiero|graph|syntaxhighlight|imagemap|templatestyles|style|script'
FILE = r'(?:file|image|media|category):|[^][|\n]*\.(?:jpe?g|png|gif|svg|tiff?|webp|og[gv]|webm|pdf)(?= *[|\]])'
RULES = (                   # in this order, and again where one thing was in another
    (innermost('<!--', '-->'), ''),
    (innermost(rf'<(?:{WHOLE})\b[^<>]*(?<!/)>', rf'</(?:{WHOLE})\s*>'), ''),
    (innermost(r'\{\{(?:\{(?!\{))?', r'\}\}(?:\}(?!\}))?'), ''),       # templates and {{{parameters}}} of templates
    (innermost(r'^[ \t:]*\{\|', r'^[ \t]*\|\}'), ''),                  # tables, at the start of a line
    (r'\[(?:https?:|ftp:)?//[^][\s]++([^][\n]*)\]', r'\1'),            # links keep their label ...
    (rf'\[\[(?!:?(?:{FILE}))(?:[^][|\n]*\|)?([^][\n]*)\]\]', r'\1'),
    (rf'\[\[:?(?:{FILE})[^][]*\]\]', ''),                              # ... files go with those in their captions
    (rf'</?(?:br|p|hr|div|li|[ou]l|d[ltd]|t[rdh]|table|blockquote|center|h[1-6]){ATTRIBUTES}', ' '),
    # tags by their names and attributes: in "x<y then z>w" and "a <b and c> d" there is none
    (r'</?(?:a|abbr|b|bd[io]|big|caption|cite|code|del|dfn|em|font|i|img|ins|kbd|mark|nowiki|noinclude|includeonly|'
     r'onlyinclude|poem|pre|q|r[tbp]|ruby|s|samp|section|small|span|strike|strong|su[bp]|t?body|thead|tt|u|var|wbr)'
     + ATTRIBUTES, ''),
    (r"'{3,}", ''),
    (r"(?<![\d'])''(?!\s)([^'\n]+(?:'[^'\n]+)*)''", r'\1'),            # italics, not 5' 11''
    (r'^={2,6}([^=\n]+)={2,6}[ \t]*$', r'\1'),
    (r'^[*#:;]+[ \t]|\bformula_\d+\b|(?-i:__[A-Z]+__)', ''))
# what is left of marks without their other half, and of tags that are no words, whatever their attributes are
HALVES = (r'<!--|\{\{+|\}\}+|\[\[|\]\]|^[ \t:]*\{\||^[ \t]*\|\}|'
          rf'</?(?:references|br|div|span|font|{WHOLE})\b[^<>]*>')
# a heading after which there are but items of lists and short lines that are no sentences, to the end
HEADING = (r'^[^\w\n]*(?:see also|(?:notes and )?references|external links|further reading|notes|footnotes|sources|'
           r'citations|bibliography)[^\w\n]*$')
TAIL = rf'{HEADING}(?:\n(?!{HEADING})(?:[^\w\n].*|.{{0,150}}(?<![.!?।。]))$)*+\Z'

def unescape(mark):
    return html.unescape(mark[0])

def visible(text):
    """Text in NFC, for which a letter has at most 30 signs (UAX 15: more are no text), without invisible characters."""
    text = re.sub(r'([^\w\0-\u02ff]{30})[^\w\0-\u02ff]+', r'\1', text)
    return INVISIBLE.sub('', unicodedata.normalize('NFC', text))

def replace(rules, text):
    """The text after all rules, again and again while that changes it: nine times at most."""
    for _ in range(9):
        before = text
        for pattern, by in rules:
            text = re.sub(pattern, by, text, flags=FLAGS)
        if text == before:
            break
    return text

def clean(text):
    """Plain text: no markup, formula names, invisible characters, sections after the article and runs of blanks."""
    text = ENTITY.sub(unescape, ENTITY.sub(unescape, text))            # twice: dumps have &amp;nbsp;
    text = replace([(TAIL, '')], '\n' + visible(text).strip())
    if any(mark in text for mark in MARKS):
        text = replace([(HALVES, '')], replace(RULES, text))
    text = re.sub(r'[^\S\n]{2,}|[^\S\n ]', ' ', text)
    return re.sub(r'\n{3,}', '\n\n', re.sub(r' ?\n ?', '\n', text)).strip()

# -----------------------------------------------------------------------------
# articles

def article(record):
    """What is kept of a record. hash: 64 bits of the first 200 letters and digits, alike in duplicates. Articles that
    differ in a name there are none: that would take more than hashes."""
    text = clean(str(record['text'] or ''))
    letters = re.sub(r'\W+', '', text[:1_000].casefold())[:200]
    mark = hashlib.blake2b(letters.encode(), digest_size=8).digest()
    return {'id': str(record['id']), 'title': visible(str(record['title'])), 'text': text, 'hash': int.from_bytes(mark)}

def articles(cfg, folder):
    """Clean articles without stubs and duplicates, of each CHUNK records a file."""
    seen, stream = set(), iter(tqdm(records(cfg), 'articles', disable=None))
    for i in itertools.count():
        some = list(itertools.islice(stream, CHUNK)) if len(seen) < cfg.max_articles else []
        if not some:
            break
        path, lines = f'{folder}/{i:05d}.jsonl', ''
        for a in read_file(path) if os.path.exists(path) else map(article, some):
            if len(a['text']) >= cfg.min_chars and a['hash'] not in seen and len(seen) < cfg.max_articles:
                seen.add(a['hash'])
                lines += json.dumps(a, ensure_ascii=False) + '\n'
        if lines:
            runs.write_text(path, lines)

# -----------------------------------------------------------------------------
# embeddings

LETTER = re.compile(f'.[{SIGNS}]*')
WORD = re.compile(rf'(?:[^\W\d_]+[{SIGNS}\u200c\u200d]*+)++')           # with the signs of its letters
UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
                      '\U00020000-\U0003ffff]')

def words_of(text):
    """The words of a text in lower case, without those of English that are in every text; of scripts that put no
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each two neighbouring letters."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    for word in WORD.findall(text.lower()):
        if UNSPACED.match(word):
            letters = LETTER.findall(word)
            yield from map(''.join, zip(letters, letters[1:]))
        elif len(word) > 2 and word not in ENGLISH_STOP_WORDS:
            yield word

def beginnings(articles, chars):
    return [f'{a["title"]}\n{a["text"][:chars]}' for a in articles]

def lsa(cfg, texts):
    """A function texts -> unit vectors, by TF-IDF and SVD of these texts."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer
    if sum(len(UNSPACED.findall(text)) for text in texts) > sum(map(len, texts)) / 3:
        raise ValueError('most of these letters are of scripts without spaces between words')
    words = TfidfVectorizer(analyzer=words_of, max_features=50_000, max_df=0.5, sublinear_tf=True, dtype=np.float32)
    weights = words.fit_transform(texts)
    svd = TruncatedSVD(min(LSA_DIM, min(weights.shape) - 1), random_state=cfg.seed).fit(weights)
    return make_pipeline(words, svd, Normalizer(copy=False)).transform

def transformer(cfg):
    """A function texts -> unit vectors, by a sentence-transformers model, on all GPUs if there are several."""
    import torch
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(cfg.embedder, device=cfg.device or None)
    with contextlib.suppress(AttributeError):               # a table of word vectors has no longest sequence
        model.max_seq_length = min(cfg.embed_tokens, model.max_seq_length or cfg.embed_tokens)
    pool = None
    if not cfg.device and torch.cuda.device_count() > 1:
        pool = model.start_multi_process_pool()
        atexit.register(model.stop_multi_process_pool, pool)
    return partial(model.encode, pool=pool, batch_size=64, normalize_embeddings=True)

def vectors(cfg, folder, source, n):
    """Of each file of articles a file of unit vectors, float32 [articles, d]."""
    is_lsa = cfg.embedder == 'lsa'
    chars = LSA_CHARS if is_lsa else 8 * cfg.embed_tokens   # nearly always enough
    try:
        encode = lsa(cfg, beginnings(sample(read_all(source), n), chars)) if is_lsa else transformer(cfg)
    except Exception as e:
        raise SystemExit(f'embedder = {cfg.embedder!r}: of no use here ({reason(e)}); lsa wants words that tell '
                         'articles apart; or name a sentence-transformers model, and check the network') from None
    for some, path in unmade(folder, source):
        runs.write_array(path, encode(beginnings(some, chars)).astype(np.float32))

# -----------------------------------------------------------------------------
# clusters

def distinctive(texts, labels, sizes):
    """Fifteen words that tell each topic from the others: in more of its articles than they would be if they were in
    as many of every topic, by Pearson's residual (observed - expected) / sqrt(expected). [topic][15]."""
    from sklearn.feature_extraction.text import CountVectorizer
    counter = CountVectorizer(max_features=20_000, binary=True, analyzer=words_of)
    try:
        counts = counter.fit_transform(texts)               # [articles, words]
    except ValueError:
        raise SystemExit('prepare_wiki.py: these articles hold no words to tell topics by') from None
    observed = np.eye(len(sizes))[labels].T @ counts        # [topics, words]
    expected = np.outer(sizes / sizes.sum(), observed.sum(0))
    best = np.argsort((expected - observed) / np.sqrt(expected))[:, :15]
    return counter.get_feature_names_out()[best]

def clusters(cfg, folder, source, vectors_folder, made_of, ids, n):
    """K-means of a sample of the articles; clusters.json with the labels of all and what they are `made_of`, topics.md
    for a person. ids: of the articles, their digest."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
    files = files_of(vectors_folder, '.npy')
    x = np.stack([*sample(itertools.chain.from_iterable(map(np.load, files)), n)])
    K = cfg.n_topics
    if len(np.unique(x.round(3), axis=0)) < K:
        raise SystemExit(f'n_topics = {K}: the articles fall into fewer clusters; lower it, or try another embedder')
    fits = [KMeans(K, n_init=3, random_state=cfg.seed + i).fit(x) for i in range(3)]
    pairs = [(a.labels_, b.labels_) for a, b in itertools.combinations(fits, 2)]
    ari = [adjusted_rand_score(a, b) for a, b in pairs]
    ami = [adjusted_mutual_info_score(a, b) for a, b in pairs]
    labels = np.concatenate([fits[0].predict(np.load(path)) for path in files])
    sizes = np.bincount(labels, minlength=K)
    titles, texts = zip(*sample(((a['title'], a['text'][:1_000]) for a in read_all(source)), n))
    words = distinctive(texts, fits[0].labels_, sizes)
    nearest = np.array(titles)[fits[0].transform(x).argsort(axis=0)[:10].T]        # [topics, 10]

    head = (f'K-means of {made_of["embedder"]} vectors of {n:,} articles; between three seeds: adjusted Rand index '
            f'{np.mean(ari):.2f}, adjusted mutual information {np.mean(ami):.2f}; largest topic: {max(sizes) / n:.0%}')
    if np.mean(ari) < 0.5 or max(sizes) / n > 0.2 + 0.8 / K:           # 30% of 8 topics, 60% of 2
        head += '\nWARNING: topics that another seed does not find, or a large one; try another embedder or n_topics'
    print(head)
    text = f'# {K} topics\n\n{head}\n'
    for k in range(K):
        text += (f'\n## Topic {k}: {", ".join(words[k][:3])}\n\n{sizes[k]:,} articles, {sizes[k] / n:.1%}\n\n'
                 f'Words: {", ".join(words[k])}\n\nNearest: {"; ".join(nearest[k])}\n')
    runs.write_text(f'{folder}/topics.md', text)
    runs.write_json(f'{folder}/clusters.json', {
        'made_of': made_of, 'ids': ids, 'articles': n, 'sizes': sizes, 'words': words, 'nearest': nearest,
        'labels': base64.b64encode(zlib.compress(labels.astype(np.uint8), 9)).decode(), 'ari': ari, 'ami': ami})

# -----------------------------------------------------------------------------
# tokens

def tokenizer(cfg, folder, source, val):
    """Byte-level BPE of training articles, tokenizer.json: whatever the text, decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, initial_alphabet=words.alphabet(), show_progress=False)
    # training takes the square of the longest word: of a longer one each 100 letters are a word
    some = sample(itertools.compress(read_all(source), ~val), len(val))
    bpe.train_from_iterator((re.sub(r'\S{100}', r'\g<0> ', a['text']) for a in some), trainer)
    runs.write_text(f'{folder}/tokenizer.json', bpe.to_str())

def tokens(cfg, folder, source, tokenizer_folder):
    """The tokens of all articles, one after the other, in tokens.bin, uint16; for each file of articles their numbers,
    written last: what tokens.bin has beyond them is of a run that was stopped."""
    from tokenizers import Tokenizer
    bpe = Tokenizer.from_file(f'{tokenizer_folder}/tokenizer.json')
    with open(f'{folder}/tokens.bin', 'ab') as f:
        f.truncate(2 * sum(np.load(path).sum() for path in files_of(folder, '.npy')))
        for some, path in unmade(folder, source):
            ids = [e.ids for e in bpe.encode_batch_fast([a['text'] for a in some])]
            f.write(np.concatenate(ids).astype(np.uint16))
            f.flush()
            runs.write_array(path, [len(x) for x in ids])

# -----------------------------------------------------------------------------
# rows

def next_topic_weights(tokens):
    """Weights w [K] of a draw without repeats, P(d | c) = w_d / (1 - w_c), that visits topics in proportion to
    `tokens` [K], as far as that can be: the visits are proportional to w_c (1 - w_c)."""
    share = tokens / tokens.sum()
    w = share.copy()
    for _ in range(50):
        w = share / np.maximum(1 - w, 0.5)                  # half of all segments is the most a topic can have
        w /= w.sum()
    return w

def pack(rng, lengths, labels, width, low, high, least):
    """
    Cut articles into rows of `width` tokens: yields each as [(article, start, length), ...].

    lengths, labels: tokens and topic of each article [n]. A row has U{low..high} pieces, neighbours of different
    topics, each of one article, no article twice; `least` tokens each, and the rest cut at uniform places. A token is
    used at most once, an article from its beginning on: a piece is the last of one that has just as many tokens left,
    else of any that has more. Ends shorter than `least`, and what fits no row in the end, are lost.
    """
    pools = [[] for _ in range(labels.max() + 1)]           # (tokens left, article), sorted, by topic
    for i in np.argsort(lengths, kind='stable').tolist():
        if lengths[i] >= least:
            pools[labels[i]].append((int(lengths[i]), i))
    n_rows = failed = 0
    while failed < 100:
        if failed or n_rows % 2_000 == 0:
            left = np.array([sum(tokens for tokens, _ in pool) for pool in pools])
            if np.count_nonzero(left) < 2:
                break
            chances = next_topic_weights(left).cumsum()[:-1].tolist()
        n = rng.integers(low, high + 1)
        cuts = np.sort(rng.integers(0, width - n * least + 1, n - 1))
        row, topic = [], -1
        for size in (np.diff(cuts, prepend=0, append=width - n * least) + least).tolist():
            before = topic
            while topic == before:
                topic = bisect.bisect(chances, rng.random())
            pool = pools[topic]
            i = bisect.bisect(pool, (size,))                # of the shortest that is long enough
            if i == len(pool):
                break
            if pool[i][0] > size:
                i = rng.integers(i, len(pool))
            row.append((size, *pool.pop(i)))
        whole = len(row) == n                               # else all goes back; another draw may do
        if whole:
            yield [(article, lengths[article] - rest, size) for size, rest, article in row]
        for size, rest, article in row:
            rest -= whole * size
            if rest >= least:
                bisect.insort(pools[labels[article]], (rest, article))
        n_rows += whole
        failed = 0 if whole else failed + 1

class RowsOnDisk:
    """Rows [rows, width] of a file, read when they are sliced: of a memory map all that was read counts as memory."""
    ndim = 2

    def __init__(self, path, dtype, width):
        self.path, self.dtype, self.width = path, np.dtype(dtype), width

    def __len__(self):
        return os.path.getsize(self.path) // self.dtype.itemsize // self.width

    def __getitem__(self, rows):
        start, stop = self.width * rows.start, self.width * min(rows.stop, len(self))
        flat = np.fromfile(self.path, self.dtype, stop - start, offset=start * self.dtype.itemsize)
        return flat.reshape(-1, self.width)

def write_rows(cfg, name, mine, lengths, labels, folder):
    """The rows of a split as NAME.bin and NAME_topics.bin beside the tokens in folder; returns its counts. mine: its
    articles; lengths, labels: of all articles [n]."""
    width = cfg.block_size + 1
    low, high = VAL_SEGMENTS if name == 'val' else (cfg.min_segments, cfg.max_segments)
    rng = np.random.default_rng([cfg.seed, 3 + (name == 'val')])
    first = (np.cumsum(lengths) - lengths)[mine]
    lengths, labels = lengths[mine], labels[mine]
    with (open(f'{folder}/tokens.bin', 'rb') as tokens, open(f'{folder}/{name}.bin', 'wb') as x,
          open(f'{folder}/{name}_topics.bin', 'wb') as z):
        rows = list(pack(rng, lengths, labels, width, low, high, cfg.min_segment_len))
        for i in rng.permutation(len(rows)):                # the last ones are of the ends of articles
            for article, start, size in rows[i]:
                tokens.seek(2 * int(first[article] + start))
                x.write(tokens.read(2 * size))
                z.write(bytes([labels[article]]) * size)
    if not rows:
        raise SystemExit(f'{cfg.source}: {len(mine)} {name} articles do not make one row of {low}-{high} segments '
                         f'in {width} tokens; give more, or lower block_size, min_segments or min_segment_len')
    total, used = int(lengths.sum()), len(rows) * width
    print(f'{name:10}{len(rows):,} rows, {used / total:.1%} of {total:,} tokens (of a topic that has more than half of '
          'them a part is left)')
    return {'articles': len(mine), 'tokens': total, 'used': used}

# -----------------------------------------------------------------------------

def main(cfg):
    """Writes data_dir unless it is there with the same parameters; returns the folder."""
    check(cfg)
    meta = parameters(cfg)
    if shards.is_there(cfg.data_dir, meta):
        shards.read(cfg.data_dir)
        print(f'{cfg.data_dir} is there, with these parameters')
    else:
        with runs.locked(cfg.work_dir):
            prepare(cfg, meta)
    return cfg.data_dir

def prepare(cfg, meta):
    """All phases; writes data_dir."""
    source = phase(cfg, meta, ARTICLES, articles)
    ids = [a['id'] for a in read_all(source)]
    n = len(ids)
    n_val = round(cfg.val_share * n)
    if n <= cfg.n_topics or not 0 < n_val < n:
        raise SystemExit(f'{cfg.source}: {n} articles after cleaning are too few for n_topics = {cfg.n_topics} or '
                         f'val_share = {cfg.val_share}; give more, or choose other n_topics, val_share or min_chars')
    val = np.zeros(n, bool)                                 # the split, by article, before anything is packed
    val[np.random.default_rng([cfg.seed, 0]).permutation(n)[:n_val]] = True

    digest = hashlib.sha256('\n'.join(ids).encode()).hexdigest()[:16]
    topics_folder = cfg.topics_from
    if not topics_folder:
        made_of = {key: meta[key] for key in CLUSTERS[-4:] if key in meta}
        vectors_folder = phase(cfg, meta, VECTORS, vectors, source, n)
        topics_folder = phase(cfg, meta, CLUSTERS, clusters, source, vectors_folder, made_of, digest, n)
    topics = read_topics(topics_folder)
    if topics.get('ids') != digest or topics['n_topics'] != cfg.n_topics:
        raise SystemExit(f'{topics_folder}: has {topics["n_topics"]} topics of {len(topics["labels"]):,} other '
                         f'articles, not n_topics = {cfg.n_topics} of these {n:,}; give the same source, max_articles '
                         'and min_chars, or leave topics_from out')
    bpe_folder = phase(cfg, meta, TOKENS, tokenizer, source, val)
    folder = phase(cfg, meta, TOKENS, tokens, source, bpe_folder)
    lengths = np.concatenate([np.load(path) for path in files_of(folder, '.npy')])

    counts, arrays = {}, {}
    for name, mine in (('train', ~val), ('val', val)):
        counts[name] = write_rows(cfg, name, np.flatnonzero(mine), lengths, topics['labels'], folder)
        for key in (name, f'{name}_topics'):
            arrays[key] = RowsOnDisk(f'{folder}/{key}.bin', shards.DTYPES[key], cfg.block_size + 1)
    meta['corpus'] = {'articles': n, 'tokens': counts, 'val_ids': list(itertools.compress(ids, val)),
                      'topics': {key: topics.get(key) for key in ('sizes', 'ari', 'ami')}}
    meta['references'] = {'uniform': math.log(cfg.vocab_size), 'bigram': None, 'filter': None, 'oracle': None}
    shards.write(cfg.data_dir, arrays, meta, {
        'tokenizer.json': bpe_folder, 'clusters.json': topics_folder, 'topics.md': topics_folder})

if __name__ == '__main__':
    # a config file of an experiment means its runs by out_dir; on this command line it can only be the dataset
    command(main, __file__, argv=[arg.replace('--out_dir=', '--data_dir=', 1) for arg in sys.argv[1:]])
