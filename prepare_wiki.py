"""
Wikipedia -> topics by meaning -> byte-level BPE -> rows of several topics, in the format of shards.py.
Reads articles: a hub dataset, or parquet or jsonl with id, title and text. Writes data_dir (topics.md in it), work_dir.

    python prepare_wiki.py config/wiki.py                                        # downloads: needs the network
    python prepare_wiki.py --source=articles.parquet --embedder=lsa --data_dir=data/my_wiki

Phases: articles (cleaned, no stubs, no duplicates), vectors, clusters, tokenizer, tokens, rows. Each has a folder in
work_dir, named by what it depends on: what is done is skipped, and another n_topics reuses the vectors. Neither memory
nor what a kill loses grows with the corpus: a phase goes on after its last file (of CHUNK articles; rows of PART), and
what is fitted is fitted to SAMPLE articles. Tokenizer and training rows come from the training articles alone. Machines
differ in the last digits of vectors, so in rows: --topics_from=FOLDER takes the labels of a dataset there.
"""
import base64
import fnmatch
import glob
import html
import json
import math
import os
import re
import unicodedata
import zlib
from itertools import chain, combinations, compress, count, islice
from os.path import basename, exists, isdir, isfile, normpath

import numpy as np
from sklearn import cluster, decomposition, feature_extraction, metrics, pipeline, preprocessing
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm                   # not machine.progress: torch alone is 250 MB

import shards
from configurator import block, command
from runs import locked, read_json, write_array, write_json, write_text

# -----------------------------------------------------------------------------
# config

source = 'wikimedia/wikipedia'      # hub dataset, downloaded; or parquet or jsonl: a file, a folder or a glob
subset = '20231101.en'              # of a hub dataset: the folder of its parquet files
max_articles = 500_000              # articles kept, at most [1, 2**31)
min_chars = 500                     # characters; shorter articles are stubs [0, 2**31)
embedder = 'all-MiniLM-L6-v2'       # sentence-transformers model or its folder; lsa = TF-IDF and SVD, offline
n_topics = 8                        # clusters [2, 255]
topics_from = ''                    # folder with clusters.json and topics.md: the same articles get its topics
vocab_size = 16_384                 # tokens of the byte-level BPE [257, 65535]
block_size = 512                    # predicted tokens in a row; a row on disk has one more [1, 2**31)
val_share = 0.02                    # of the articles: validation (0, 1)
min_segments = 2                    # segments in a training row, uniform from this ... [1, 2**31)
max_segments = 4                    # ... to this; rows of one topic are not made [1, 2**31)
min_segment_len = 64                # tokens in every segment, at least [1, 2**31)
seed = 0                            # of split, clusters, rows, and of the sample of a hub dataset [0, 2**31)
device = ''                         # of the embedder; '' = the GPU, or the CPU where there is none
data_dir = 'data/wiki'              # the dataset goes there
work_dir = 'data/wiki_work'         # what the phases leave for each other; may be deleted

CLEANING = 2                # version of clean(): raise it when its rules change, so that no older text is reused
NO_PARAMETERS = ('topics_from', 'device', 'data_dir', 'work_dir')
VAL_SEGMENTS = (2, 4)       # not a knob: validation rows are cut alike in every dataset
CHUNK = 250                 # records of the source in a file of the work folder
PART = 4_000                # articles of a split that are packed into rows together
SAMPLE = 16_000             # articles, evenly spread, that LSA, K-means, the topics' words and the BPE are made from
LSA_CHARS, MODEL_CHARS, LSA_DIM = 2_000, 600, 128      # LSA and a model read so much of an article; 130 tokens or so
ARTICLES = ('source', 'source_digest', 'subset', 'cleaning', 'max_articles', 'min_chars', 'seed')
TOKENS = ARTICLES + ('vocab_size', 'val_share')            # what these phases depend on, of meta.json

def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it. The source has a digest, unless it is not here any more."""
    meta = {key: getattr(cfg, key) for key in block(__file__) if key not in NO_PARAMETERS}
    for key in ('source', 'embedder'):
        meta[key] = basename(normpath(meta[key]))
    sums = [shards.file_entry(path)['sha256'] for path in source_files(cfg)]
    if sums:
        meta['source_digest'] = shards.digest(sums)
    if cfg.topics_from:
        meta |= read_topics(cfg.topics_from)['made_of']
    return meta | {'kind': 'wiki', 'cleaning': CLEANING, 'n_topics': cfg.n_topics}

def source_files(cfg):
    """The files of a local source, which is a file, a folder or a glob, sorted; [] for a dataset of the hub."""
    pattern = f'{glob.escape(cfg.source)}/**' if isdir(cfg.source) else cfg.source
    paths = {cfg.source, *glob.glob(pattern, recursive=True)}
    return sorted(path for path in paths if path.endswith(('.parquet', '.jsonl')) and isfile(path))

def read_topics(folder):
    """clusters.json of a folder, its 'labels' as an array uint8 [articles]."""
    try:
        found = read_json(f'{folder}/clusters.json')
        return found | {'labels': np.frombuffer(zlib.decompress(base64.b64decode(found['labels'])), np.uint8)}
    except (ValueError, KeyError, TypeError, zlib.error) as e:
        raise SystemExit(f'{folder}/clusters.json: no topics there ({reason(e)}); name a dataset of text') from None

def reason(error):
    """The name and the first line of an error."""
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]

# -----------------------------------------------------------------------------
# files: of the work folder, of the source

def phase(cfg, meta, keys, work, *inputs):
    """The folder of a phase, named by it and by what it depends on. Unless done.json, its last file, is there,
    work(cfg, folder, *inputs) makes what is missing of its files. Nothing is deleted."""
    params = {key: meta.get(key) for key in keys}
    folder = f'{cfg.work_dir}/{work.__name__}-{shards.digest(json.dumps(params).encode())}'
    if not exists(f'{folder}/done.json'):
        print(folder)
        os.makedirs(folder, exist_ok=True)
        work(cfg, folder, *inputs)
        write_json(f'{folder}/done.json', params)
    return folder

def files_of(folder, suffix):
    """The numbered files of a phase, and nothing else that may lie beside them."""
    return sorted(glob.glob(f'{glob.escape(folder)}/[0-9][0-9][0-9][0-9][0-9]{suffix}'))

def read(path, order=range):
    """The records of a file, lines of JSON or parquet, of which the row groups come in this order."""
    if path.endswith('.parquet'):
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(200, order(file.num_row_groups), ['id', 'title', 'text']):
                yield from batch.to_pylist()
    else:
        with open(path, encoding='utf-8-sig') as f:         # with or without a byte order mark
            yield from (json.loads(line) for line in f if line.strip())

def read_all(folder):
    """{'id', 'title', 'text', 'hash'} of all articles, one after the other."""
    return chain.from_iterable(map(read, files_of(folder, '.lines')))

def unmade(folder, items):
    """(item, path) of each item of which a phase has still to make the array at this path."""
    for i, item in enumerate(tqdm(items, basename(folder), disable=None)):
        path = f'{folder}/{i:05d}.npy'
        if not exists(path):
            yield item, path

def sample(stream, n):
    """SAMPLE of the n articles, or of what belongs to each, evenly spread; all if there are no more."""
    return islice(stream, 0, None, math.ceil(n / SAMPLE))

def hub_files(cfg, order):
    """The parquet files of a hub dataset, in this order; each is downloaded when it is needed, once."""
    from huggingface_hub import hf_hub_download, list_repo_files        # only here: nothing else needs it
    names = fnmatch.filter(list_repo_files(cfg.source, repo_type='dataset'), f'{cfg.subset}/*.parquet')
    for i in order(len(names)):
        yield hf_hub_download(cfg.source, sorted(names)[i], repo_type='dataset')

def records(cfg):
    """{'id', 'title', 'text'} of the source; of the hub in an order of files and row groups drawn from the seed."""
    local = source_files(cfg)
    order = range if local else np.random.default_rng([cfg.seed, 1]).permutation
    place, number = cfg.source, 0
    try:
        for place in local or hub_files(cfg, order):
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

ENTITY = re.compile(r'&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]\w{1,30});', re.I)
# controls, zero-width and direction marks, surrogates; ZWNJ and ZWJ, which spell words, only after European letters
INVISIBLE = re.compile(     # a look ahead, here and in WORD, passes over ordinary characters fast
    '(?![\n -~])(?:[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f'
    '\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff]|(?<![^\0-\u05ff])[\u200c\u200d]+)')
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
    (r'</?(?:a|abbr|b|bd[io]|big|caption|cite|code|del|dfn|em|font|i|img|ins|kbd|mark|nowiki|noinclude|includeonly|'
     r'onlyinclude|poem|pre|q|r[tbp]|ruby|s|samp|section|small|span|strike|strong|su[bp]|t?body|thead|tt|u|var|wbr)'
     + ATTRIBUTES, ''),                                                # no tags: "x<y then z>w", "a <b and c> d"
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
    text = re.sub(r'([^\0-\u02ff\w]{30})[^\0-\u02ff\w]+', r'\1', text)
    return INVISIBLE.sub('', unicodedata.normalize('NFC', text))

def replace(rules, text):
    """The text after all rules, again and again while that changes it: nine times at most."""
    for _ in range(9):
        before = text
        for pattern, by in rules:
            text = re.sub(pattern, by, text, flags=re.I | re.M)
        if text == before:
            break
    return text

def clean(text):
    """Plain text: no markup, formula names, invisible characters, sections after the article and runs of blanks."""
    text = ENTITY.sub(unescape, ENTITY.sub(unescape, text))            # twice: dumps have &amp;nbsp;
    text = replace([(TAIL, '')], '\n' + visible(text).strip())
    if any(mark in text for mark in MARKS):
        text = replace([(HALVES, '')], replace(RULES, text))
    lines = [' '.join(line.split()) for line in text.split('\n')]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip()

def article(record):
    """What is kept of a record. hash: of the first 200 letters and digits; articles with the same are duplicates."""
    text = clean(str(record['text'] or ''))
    mark = shards.digest(re.sub(r'\W+', '', text[:1_000].casefold())[:200].encode())
    return {'id': str(record['id']), 'title': visible(str(record['title'])), 'text': text, 'hash': mark}

def articles(cfg, folder):
    """Clean articles without stubs and duplicates, of each CHUNK records a file of JSON lines."""
    seen, stream = set(), iter(tqdm(records(cfg), 'articles', disable=None))
    for i in count():
        some = list(islice(stream, CHUNK))
        path, lines = f'{folder}/{i:05d}.lines', ''         # not .jsonl: what lies here is no source
        for a in read(path) if exists(path) else map(article, some):
            if len(a['text']) >= cfg.min_chars and a['hash'] not in seen and len(seen) < cfg.max_articles:
                seen.add(a['hash'])
                lines += json.dumps(a, ensure_ascii=False) + '\n'
        if lines:
            write_text(path, lines)
        if not some or len(seen) == cfg.max_articles:
            break

# -----------------------------------------------------------------------------
# topics

SIGNS = ''.join(c for c in map(chr, range(0x300, 0x12000)) if unicodedata.category(c)[0] == 'M')   # of a letter before
WORD = rf'[^\W\d_](?:[^\W\d_]|(?![\0-\u02ff])[{SIGNS}\u200c\u200d]){{2,}}'    # a letter, then letters and their signs
# Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words
UNSPACED = '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]'

def beginnings(cfg, articles):
    """What the embedder reads of each article."""
    chars = LSA_CHARS if cfg.embedder == 'lsa' else MODEL_CHARS
    return [f'{a["title"]}\n{a["text"][:chars]}' for a in articles]

def tf_idf(texts):
    """The words of texts, weighted: (a TfidfVectorizer fitted to them, its sparse float32 [texts, words])."""
    words = feature_extraction.text.TfidfVectorizer(token_pattern=WORD, stop_words='english', max_features=50_000,
                                                    max_df=0.5, sublinear_tf=True, dtype=np.float32)
    return words, words.fit_transform(texts)

def lsa(cfg, texts):
    """A function texts -> vectors, by TF-IDF and SVD of these texts."""
    if sum(len(re.findall(UNSPACED, text)) for text in texts) > sum(map(len, texts)) / 3:
        raise ValueError('most of these letters are of scripts without spaces between words')
    words, weights = tf_idf(texts)
    svd = decomposition.TruncatedSVD(min(LSA_DIM, min(weights.shape) - 1), random_state=cfg.seed)
    return pipeline.make_pipeline(words, svd.fit(weights)).transform

def vectors(cfg, folder, source, texts):
    """Of each file of articles a file of unit vectors, float32 [articles, d]. texts: of a sample of them."""
    try:
        if cfg.embedder == 'lsa':
            encode = lsa(cfg, texts)
        else:
            from sentence_transformers import SentenceTransformer
            encode = SentenceTransformer(cfg.embedder, device=cfg.device or None).encode
    except Exception as e:
        raise SystemExit(f'embedder = {cfg.embedder!r}: of no use here ({reason(e)}); lsa wants words that tell '
                         'articles apart; or name a sentence-transformers model, and check the network') from None
    for file, path in unmade(folder, files_of(source, '.lines')):
        write_array(path, preprocessing.normalize(encode(beginnings(cfg, read(file)))))

def clusters(cfg, folder, vectors_folder, texts, facts):
    """K-means of a sample of the articles, which has these texts; clusters.json with the labels of all and the facts,
    topics.md for a person: what the topics are, and how stable they are."""
    files, K = files_of(vectors_folder, '.npy'), cfg.n_topics
    x = np.stack([*sample(chain.from_iterable(map(np.load, files)), facts['articles'])])
    if len(np.unique(x.round(3), axis=0)) < K:
        raise SystemExit(f'n_topics = {K}: the articles fall into fewer clusters; lower it, or try another embedder')
    fits = [cluster.KMeans(K, n_init=3, random_state=cfg.seed + i).fit(x) for i in range(3)]
    pairs = list(combinations([fit.labels_ for fit in fits], 2))
    ari = np.mean([metrics.adjusted_rand_score(*pair) for pair in pairs])
    ami = np.mean([metrics.adjusted_mutual_info_score(*pair) for pair in pairs])
    labels = np.concatenate([fits[0].predict(np.load(path)) for path in files])
    stable = f'Between three seeds: adjusted Rand index {ari:.2f}, adjusted mutual information {ami:.2f}.'
    if ari < 0.5:
        stable += '\nWARNING: another seed does not find these topics; try another embedder or n_topics'
    print(stable)
    text = f'# {K} topics of {len(labels):,} articles by {cfg.embedder}\n\n{stable}\n'
    words, weights = tf_idf(texts)
    for k, size in enumerate(np.bincount(labels)):
        more = weights[fits[0].labels_ == k].mean(0) - weights.mean(0)         # in this topic than in all [1, words]
        best = words.get_feature_names_out()[np.argsort(-np.ravel(more))[:15]]
        text += f'\n## Topic {k}\n\n{size:,} articles\n\nWords: {", ".join(best)}\n'
    write_text(f'{folder}/topics.md', text)
    code = base64.b64encode(zlib.compress(labels.astype(np.uint8), 9)).decode()
    write_json(f'{folder}/clusters.json', facts | {'ari': ari, 'ami': ami, 'labels': code})

# -----------------------------------------------------------------------------
# tokens and rows

def tokenizer(cfg, folder, source, is_train):
    """Byte-level BPE of training articles, tokenizer.json: whatever the text, decoding gives it back."""
    some = sample(compress(read_all(source), is_train), len(is_train))
    # training takes the square of the longest word: of a longer one each 100 letters are a word
    texts = (re.sub(r'\S{100}', r'\g<0> ', a['text']) for a in some)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, cfg.vocab_size, min_frequency=1, show_progress=False)
    write_text(f'{folder}/tokenizer.json', bpe.to_str())

def tokens(cfg, folder, source, tokenizer_folder):
    """The tokens of all articles, uint16, in tokens.bin; for each file of articles their numbers, written last: what
    tokens.bin has beyond them is of a run that was stopped."""
    bpe = Tokenizer.from_file(f'{tokenizer_folder}/tokenizer.json')
    with open(f'{folder}/tokens.bin', 'ab') as f:
        f.truncate(2 * sum(np.load(path).sum() for path in files_of(folder, '.npy')))
        for file, path in unmade(folder, files_of(source, '.lines')):
            ids = [e.ids for e in bpe.encode_batch_fast([a['text'] for a in read(file)])]
            f.write(np.concatenate(ids).astype(np.uint16))
            f.flush()
            write_array(path, [len(x) for x in ids])

def pack(rng, lengths, labels, width, low, high, least):
    """Cut articles into rows of `width` tokens: yields each as [(article, start, size), ...].
    lengths, labels: tokens and topic of each article [n]. A row has U{low..high} pieces of different articles,
    neighbours of different topics; each has `least` tokens, and the rest is cut at uniform places. Topics are drawn by
    the square of the tokens they have left, so that they end together. A piece is of the article that has the fewest
    tokens left, but enough, and begins where its last one ended. Ends shorter than `least` are lost.
    """
    left = lengths.copy()                                   # of each article its last tokens
    failed = 0
    while failed < 100:
        left[left < least] = 0
        weights = np.bincount(labels, left) ** 2            # [topics]
        if np.count_nonzero(weights) < 2:
            break
        failed += 1
        n = rng.integers(low, high + 1)
        cuts = np.sort(rng.integers(0, width - n * least + 1, n - 1))
        row, topic, rest = [], -1, left.copy()
        for size in np.diff(cuts, prepend=0, append=width - n * least) + least:
            chances = weights * (np.arange(len(weights)) != topic)
            topic = np.searchsorted(chances.cumsum(), rng.random() * chances.sum(), 'right')
            fits = np.flatnonzero((labels == topic) & (rest >= size))
            if len(fits):
                article = fits[rest[fits].argmin()]
                row.append((article, lengths[article] - left[article], size))
                rest[article] = 0                           # no second piece of it in this row
        if len(row) == n:
            failed = 0
            for article, _, size in row:
                left[article] -= size
            yield row

def rows(cfg, folder, name, mine, lengths, labels, tokens_folder):
    """Of PART articles of a split, which are `mine`, a file of rows: tokens and topics, uint16 [2, rows, width]."""
    width = cfg.block_size + 1
    low, high = VAL_SEGMENTS if name == 'val' else (cfg.min_segments, cfg.max_segments)
    first = np.cumsum(lengths) - lengths
    for part, path in unmade(folder, np.array_split(mine, math.ceil(len(mine) / PART))):
        rng = np.random.default_rng([cfg.seed, 3, part[0]])
        packed = list(pack(rng, lengths[part], labels[part], width, low, high, cfg.min_segment_len))
        if not packed:
            raise SystemExit(f'{cfg.source}: {len(part)} {name} articles do not make one row of {low}-{high} segments '
                             f'in {width} tokens; give more, or lower block_size, min_segments or min_segment_len')
        rng.shuffle(packed)                                 # the last ones are of the ends of articles
        article, start, size = np.concatenate(packed).T
        with open(f'{tokens_folder}/tokens.bin', 'rb') as f:
            x = b''.join(os.pread(f.fileno(), 2 * n, 2 * o) for n, o in zip(size, first[part][article] + start))
        z = np.repeat(labels[part][article], size)
        write_array(path, np.concatenate([np.frombuffer(x, np.uint16), z]).reshape(2, -1, width))

def main(cfg):
    """Writes data_dir unless it is there with the same parameters; returns the folder."""
    most = max(cfg.max_segments, VAL_SEGMENTS[1])
    if not cfg.min_segments <= cfg.max_segments > 1 or most * cfg.min_segment_len > cfg.block_size + 1:
        raise SystemExit(f'min_segments = {cfg.min_segments}, max_segments = {cfg.max_segments}, min_segment_len = '
                         f'{cfg.min_segment_len}: choose what fits {most} times in {cfg.block_size + 1} tokens')
    meta = parameters(cfg)
    if not shards.is_there(cfg.data_dir, meta):
        with locked(cfg.work_dir), locked(cfg.data_dir):    # stops here, not after hours, where it cannot be written
            prepare(cfg, meta)
    return cfg.data_dir

def prepare(cfg, meta):
    """All phases; writes data_dir."""
    source = phase(cfg, meta, ARTICLES, articles)
    ids = [a['id'] for a in read_all(source)]
    n, n_val = len(ids), round(cfg.val_share * len(ids))
    if n <= cfg.n_topics or not 0 < n_val < n:
        raise SystemExit(f'{cfg.source}: {n} articles after cleaning are too few for n_topics = {cfg.n_topics} or '
                         f'val_share = {cfg.val_share}; give more, or choose other n_topics, val_share or min_chars')
    order = np.random.default_rng([cfg.seed, 0]).permutation(n)
    splits = {'train': order[n_val:], 'val': order[:n_val]}            # by article, before anything is packed
    facts = {'ids': shards.digest('\n'.join(ids).encode()), 'articles': n,
             'made_of': {'embedder': meta['embedder'], 'n_topics': cfg.n_topics}}
    topics_folder = cfg.topics_from
    if not topics_folder:
        texts = beginnings(cfg, sample(read_all(source), n))
        keys = (*ARTICLES, 'embedder')
        vectors_folder = phase(cfg, meta, keys, vectors, source, texts)
        topics_folder = phase(cfg, meta, (*keys, 'n_topics'), clusters, vectors_folder, texts, facts)
    topics = read_topics(topics_folder)
    labels, there = topics['labels'], topics['made_of']['n_topics']
    if topics['ids'] != facts['ids'] or there != cfg.n_topics:
        raise SystemExit(f'{topics_folder}: has {there} topics of {len(labels):,} other articles, not n_topics = '
                         f'{cfg.n_topics} of these {n:,}; give their source, max_articles and min_chars')
    bpe_folder = phase(cfg, meta, TOKENS, tokenizer, source, np.isin(range(n), splits['train']))
    tokens_folder = phase(cfg, meta, TOKENS, tokens, source, bpe_folder)
    lengths = np.concatenate([np.load(path) for path in files_of(tokens_folder, '.npy')])

    arrays = {}
    for name, mine in splits.items():
        keys = meta | {'split': name, 'labels': shards.digest(labels)}
        files = files_of(phase(cfg, keys, keys, rows, name, mine, lengths, labels, tokens_folder), '.npy')
        arrays[name] = (np.load(path)[0] for path in files)
        arrays[f'{name}_topics'] = (np.load(path)[1] for path in files)
    meta['corpus'] = {'articles': n, 'tokens': lengths.sum(), 'val_ids': [ids[i] for i in splits['val']]}
    meta['references'] = {'uniform': math.log(cfg.vocab_size)}
    shards.write(cfg.data_dir, arrays, meta, {
        'tokenizer.json': bpe_folder, 'clusters.json': topics_folder, 'topics.md': topics_folder})
    print(f'{cfg.data_dir}: {lengths.sum():,} tokens; rows: {shards.read_meta(cfg.data_dir)["rows"]}')

if __name__ == '__main__':
    command(main, __file__)
