"""
Wikipedia -> topics by meaning -> byte-level BPE -> rows of several topics, in the format of shards.py.

    python prepare_wiki.py config/wiki.py                                        # streams wikimedia/wikipedia
    python prepare_wiki.py --source=articles.parquet --embedder=lsa --data_dir=data/my_wiki

Six phases: articles (cleaned, without stubs and duplicates), embeddings, clusters, tokenizer, tokens, rows. Each
keeps its work in work_dir under a name made of its parameters: what is done is skipped, what was stopped goes on,
and another n_topics reuses the embeddings. Topics are labels given to all articles; the tokenizer and the training
rows come from the training articles alone. 64,000 articles on two CPU cores: see LOG.md.

Machines differ in the last digits of embeddings, so in a few labels, and then in every row.
--topics_from=results/wiki takes the labels that clusters.json keeps, for the same articles: the same dataset to the
byte, without a model.
"""
import base64
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import time
import unicodedata
import zlib
from functools import partial

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import runs
import shards
from configurator import at_least, block, configure

# -----------------------------------------------------------------------------
# config

source = 'wikimedia/wikipedia'      # hub dataset, streamed; or parquet or jsonl: a file, a folder or a glob
subset = '20231101.en'              # of a hub dataset
max_articles = 500_000              # articles kept, at most
min_chars = 500                     # shorter articles are stubs
embedder = 'all-MiniLM-L6-v2'       # sentence-transformers model or local folder; lsa = TF-IDF and SVD, offline
embed_tokens = 128                  # of an article that the embedder reads, from its beginning
n_topics = 8                        # clusters
topics_from = ''                    # folder with clusters.json and topics.md: the same articles get its topics
vocab_size = 16_384                 # tokens of the byte-level BPE
block_size = 512                    # predicted tokens in a row; a row on disk has one more
val_share = 0.02                    # of the articles: validation
min_segments = 2                    # segments in a training row, uniform from this ...
max_segments = 4                    # ... to this; 1 and 1 = pure windows
min_segment_len = 64                # tokens in every segment, at least
seed = 0                            # of split, clusters and rows
device = ''                         # of the embedder; '' = every GPU, or the CPU
data_dir = 'data/wiki'              # the dataset goes there (--out_dir= says the same)
work_dir = 'data/wiki_work'         # what the phases leave for each other; may be deleted

# -----------------------------------------------------------------------------

NO_PARAMETERS = ('topics_from', 'device', 'data_dir', 'work_dir')
COLUMNS = ('id', 'text', 'title')          # of a source
VAL_SEGMENTS = (2, 4)       # not a knob: validation rows are cut alike in every dataset
CHUNK = 2_000               # articles in a file of the work folder: what a stopped phase loses
LSA_CHARS, LSA_DIM = 4_000, 128
TAIL = re.compile(r'^[^\w\n]*(see also|references|external links|further reading|notes|bibliography)[^\w\n]*$',
                  re.I | re.M)

def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it: another value is another dataset. Files and folders by
    their name and a fingerprint, which is left out where they are not here: a dataset may be used elsewhere."""
    meta = {'kind': 'wiki'}
    for key in block(__file__):
        if key not in NO_PARAMETERS:
            meta[key] = getattr(cfg, key)
    if not hub(cfg):
        meta['source'] = os.path.basename(os.path.normpath(cfg.source))
        files = files_of(cfg)
        if files:
            meta['source_digest'] = fingerprint(files)
    if cfg.topics_from:
        return meta | read_topics(cfg.topics_from, cfg.n_topics)['made_of']
    if os.path.isdir(cfg.embedder):
        meta['embedder'] = os.path.basename(os.path.normpath(cfg.embedder))
        meta['embedder_digest'] = fingerprint(files_in(cfg.embedder))
    return meta

def read_topics(folder, n_topics):
    """clusters.json of a folder, its 'labels' as an array uint8 [articles]."""
    path = f'{folder}/clusters.json'
    found = runs.read_json(path, 'delete its folder, or give another topics_from')
    try:
        os.stat(f'{folder}/topics.md')
        found['labels'] = np.frombuffer(zlib.decompress(base64.b64decode(found['labels'])), np.uint8)
        there = found['made_of']['n_topics']
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as e:
        raise SystemExit(f'{path}: no topics there ({type(e).__name__}: {e}); topics_from is a folder with the '
                         'clusters.json and the topics.md of a dataset that prepare_wiki.py has made') from None
    if there != n_topics:
        raise SystemExit(f'{path}: has {there} topics, but n_topics = {n_topics}')
    return found

def files_in(source):
    """The files that a file, a folder or a glob stands for, sorted."""
    if os.path.isfile(source):
        return [source]
    pattern = f'{glob.escape(source)}/**' if os.path.isdir(source) else source
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))

def fingerprint(files):
    """A digest of the names and sizes of files, and of the first and the last MiB of each."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as f:
            size = os.path.getsize(path)
            digest.update(f'{os.path.basename(path)} {size} '.encode() + f.read(1 << 20))
            f.seek(max(0, size - (1 << 20)))
            digest.update(f.read())
    return digest.hexdigest()[:16]

def check(cfg):
    """Stops with one line at the first setting that cannot work."""
    at_least(cfg, seed=0, min_chars=0, max_articles=1, embed_tokens=1, block_size=1, min_segments=1,
             min_segment_len=1)
    row = cfg.block_size + 1
    most = max(cfg.max_segments, VAL_SEGMENTS[1])
    bad = [
        (not cfg.embedder, 'embedder is empty; a sentence-transformers model, a folder of one, or lsa'),
        (not 2 <= cfg.n_topics <= 255, f'n_topics={cfg.n_topics}: choose 2 to 255, labels are uint8'),
        (not 257 <= cfg.vocab_size <= 65535, f'vocab_size={cfg.vocab_size}: choose 257 (bytes, a merge) to 65535'),
        (not 0 < cfg.val_share < 1, f'val_share={cfg.val_share}: choose between 0 and 1'),
        (cfg.max_segments < 2, f'max_segments={cfg.max_segments}: at least 2, rows of one topic are not made'),
        (cfg.min_segments > cfg.max_segments, f'min_segments={cfg.min_segments} is more than {cfg.max_segments}'),
        (most * cfg.min_segment_len > row, f'{most} segments of min_segment_len={cfg.min_segment_len} do not fit '
         f'in {row} tokens (validation rows have up to {VAL_SEGMENTS[1]}); lower min_segment_len'),
    ]
    for wrong, line in bad:
        if wrong:
            raise SystemExit(f'prepare_wiki.py: {line}')

# -----------------------------------------------------------------------------
# the work folder

def phase(cfg, name, params, work, *inputs):
    """
    The folder of a phase, named by the phase and its parameters, and its facts. Unless they are there already,
    work(cfg, folder, *inputs) makes the files and returns the facts, among them the 'articles' of this run.
    done.json, the last file, holds the facts and says that the phase is done.
    """
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]
    folder = f'{cfg.work_dir}/{name}-{digest}'
    path = f'{folder}/done.json'
    os.makedirs(folder, exist_ok=True)
    for left in glob.glob(f'{glob.escape(folder)}/*.tmp*'):        # by a run that was killed
        os.remove(left)
    with contextlib.suppress(FileNotFoundError, ValueError):        # ValueError: cut short, so it is not done
        facts = json.load(open(path, encoding='utf-8'))
        print(f'{name:10}done before, in {folder}')
        return folder, facts

    clock = time.time()
    facts = work(cfg, folder, *inputs)
    seconds = time.time() - clock
    runs.write_json(path, facts | {'seconds': round(seconds, 1)})
    count = facts['articles']
    print(f'{name:10}{count:,} articles in {seconds:,.0f} s, {count / max(seconds, 1e-3):,.0f} a second')
    return folder, facts

def save(path, write):
    """A file, all or nothing: write(path of a temporary) and rename."""
    temporary = f'{path}.{os.getpid()}.tmp{os.path.splitext(path)[1]}'
    write(temporary)
    os.replace(temporary, path)

def chunks(folder, suffix):
    """The numbered files of a phase, in order."""
    return sorted(glob.glob(f'{glob.escape(folder)}/[0-9]*[0-9]{suffix}'))

def articles(folder):
    """{'id', 'title', 'text', 'hashes'} of every article kept, one after the other."""
    for path in chunks(folder, '.jsonl'):
        with open(path, encoding='utf-8') as f:
            next(f)                                         # the first line tells how far the source was read
            yield from map(json.loads, f)

def unmade(folder, suffix, source_folder, n):
    """(path, articles) of each file of CHUNK articles that a phase has still to make; n: of all articles."""
    done = CHUNK * len(chunks(folder, suffix))
    stream = itertools.islice(articles(source_folder), done, None)
    with tqdm(total=n, initial=min(n, done), desc=os.path.basename(folder), disable=None) as bar:
        for start in range(done, n, CHUNK):
            some = list(itertools.islice(stream, CHUNK))
            yield f'{folder}/{start // CHUNK:05d}{suffix}', some
            bar.update(len(some))

# -----------------------------------------------------------------------------
# articles

def hub(cfg):
    """Whether the source is a dataset of the hub: owner/name, and nothing of that name here."""
    local = os.path.exists(cfg.source) or cfg.source.endswith(('.parquet', '.jsonl'))
    return not local and re.fullmatch(r'[\w.-]+/[\w.-]+', cfg.source)

def files_of(cfg):
    """The files of a local source, sorted, without what this script writes itself; [] where there are none."""
    return [f for f in files_in(cfg.source)
            if f.endswith(('.parquet', '.jsonl')) and not re.search(r'articles-[0-9a-f]{10}.\d{5}\.jsonl$', f)]

def reason(error):
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

def need_columns(complaint, names):
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise SystemExit(f'{complaint} {", ".join(missing)}; id, title and text are needed')

def read_hub(cfg, skip):
    name = f'{cfg.source} ({cfg.subset})'
    try:
        import datasets                                     # only here: nothing else needs it
        stream = datasets.load_dataset(cfg.source, cfg.subset, split='train', streaming=True)
        need_columns(f'{name}: no column', stream.column_names or next(iter(stream)))
        yield from stream.skip(skip)
    except Exception as e:
        raise SystemExit(f'{name}: cannot be read from the hub ({reason(e)}); check the name and the network, or '
                         'give local files with --source=; the same command goes on') from None

def read_parquet(path):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        need_columns(f'{path}: no column', file.schema_arrow.names)
        for batch in file.iter_batches(500, columns=COLUMNS):
            yield from batch.to_pylist()

def read_jsonl(path):
    with open(path, encoding='utf-8-sig') as f:             # with or without a byte order mark
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = dict(json.loads(line))
            except (TypeError, ValueError):
                raise SystemExit(f'{path}, line {number}: is not JSON; one article a line is needed') from None
            need_columns(f'{path}, line {number}: no', record)
            yield record

def read_files(cfg):
    for path in files_of(cfg):
        read = read_parquet if path.endswith('.parquet') else read_jsonl
        try:
            yield from read(path)
        except UnicodeDecodeError:
            raise SystemExit(f'{path}: is not UTF-8 text; convert it') from None
        except (OSError, ValueError) as e:                  # pyarrow's errors are ValueErrors
            raise SystemExit(f'{path}: cannot be read ({reason(e)})') from None

def records(cfg, skip):
    """The rows of the source from number `skip` on: dicts with id, title and text."""
    if hub(cfg):
        return read_hub(cfg, skip)
    return itertools.islice(read_files(cfg), skip, None)

def clean(text):
    """The text without leftover markup, formula names, the sections after the article and runs of blanks."""
    text = unicodedata.normalize('NFC', text or '')
    text = re.sub(r'<[^<>\n]{1,80}>|\bformula_\d+\b|\{\{[^{}]*\}\}|\[\[|\]\]', '', text)
    tail = TAIL.search(text, len(text) // 4)                # a heading that stands alone, not an early mention
    text = text[:tail.start()] if tail else text
    return re.sub(r'\n\s*\n+', '\n\n', re.sub(r'[^\S\n]+', ' ', text)).strip()

def hashes(text):
    """[exact, near]: 64-bit hashes of all letters and digits, in lower case, and of the first 200. Articles that
    differ in a name of their opening are not near: that would take more than hashes."""
    plain = re.sub(r'\W+', '', text.casefold())
    return [hashlib.blake2b(part.encode(), digest_size=8).hexdigest() for part in (plain, plain[:200])]

def write_articles(folder, counts, chunk):
    """The next file of articles; its first line counts what was read from the source up to here."""
    path = f'{folder}/{len(chunks(folder, ".jsonl")):05d}.jsonl'
    lines = [json.dumps(line, ensure_ascii=False) + '\n' for line in (counts, *chunk)]
    runs.write_bytes(path, ''.join(lines).encode(errors='replace'))

def collect(cfg, folder):
    """The articles phase: clean, without stubs and duplicates, in files of CHUNK."""
    counts = {'read': 0, 'stub': 0, 'duplicate': 0, 'near duplicate': 0}
    done = chunks(folder, '.jsonl')                         # of a run that was stopped
    if done:
        with open(done[-1], encoding='utf-8') as f:
            counts = json.loads(next(f))
    seen = set()                                            # exact and near hashes
    kept = 0
    for article in articles(folder):
        seen.update(article['hashes'])
        kept += 1
    before = kept

    chunk = []
    with tqdm(total=cfg.max_articles, initial=kept, desc='articles', disable=None) as bar:
        for record in records(cfg, counts['read']):
            if kept == cfg.max_articles:
                break
            counts['read'] += 1
            if not isinstance(record['text'], str | None):
                raise SystemExit(f'{cfg.source}: the text of article {record["id"]} is a '
                                 f'{type(record["text"]).__name__}, not a string')
            text = clean(record['text'])
            exact, near = hashes(text)
            if len(text) < max(1, cfg.min_chars):
                counts['stub'] += 1
            elif exact in seen:
                counts['duplicate'] += 1
            elif near in seen:
                counts['near duplicate'] += 1
            else:
                seen.update((exact, near))
                kept += 1
                chunk.append({'id': str(record['id']), 'title': str(record['title'] or ''), 'text': text,
                              'hashes': [exact, near]})
                bar.update()
            if len(chunk) == CHUNK:
                write_articles(folder, counts, chunk)
                chunk = []
    if chunk:
        write_articles(folder, counts, chunk)
    print('articles  ' + ', '.join(f'{v:,} {k}' for k, v in counts.items()) + f': {kept:,} kept')
    return {'articles': kept - before, 'counts': counts, 'kept': kept}

# -----------------------------------------------------------------------------
# embeddings

def beginning(article, chars):
    return f'{article["title"]}\n{article["text"][:chars]}'

def lsa(cfg, source_folder, n):
    """Unit vectors of all articles by TF-IDF and SVD, float32 [n, d]."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize
    words = TfidfVectorizer(max_features=50_000, max_df=0.5, stop_words='english', sublinear_tf=True,
                            dtype=np.float32)
    texts = (beginning(a, LSA_CHARS) for a in tqdm(articles(source_folder), desc='TF-IDF', total=n, disable=None))
    try:
        weights = words.fit_transform(texts)
        svd = TruncatedSVD(min(LSA_DIM, min(weights.shape) - 1), random_state=cfg.seed)
        return normalize(svd.fit_transform(weights)).astype(np.float32)
    except ValueError as e:
        raise SystemExit(f'{cfg.source}: lsa finds no words to tell articles apart ({reason(e)})') from None

def embed(cfg, folder, source_folder, n):
    """Unit vectors of all articles, float32 [n, d]: lsa in one file, a model's CHUNK articles at a time."""
    if cfg.embedder == 'lsa':
        save(f'{folder}/00000.npy', partial(np.save, arr=lsa(cfg, source_folder, n)))
        return {'articles': n}
    try:
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(cfg.embedder, device=cfg.device or None)
    except Exception as e:
        raise SystemExit(f'embedder {cfg.embedder!r} cannot be loaded ({reason(e)}); name a '
                         'sentence-transformers model or a local folder of one, check the network, or choose '
                         '--embedder=lsa') from None
    model.max_seq_length = min(cfg.embed_tokens, model.max_seq_length or cfg.embed_tokens)
    count = 0
    for path, some in unmade(folder, '.npy', source_folder, n):
        texts = [beginning(a, 8 * cfg.embed_tokens) for a in some]
        parts = [model.encode(texts[i:i + 256], batch_size=64, normalize_embeddings=True, show_progress_bar=False)
                 for i in range(0, len(texts), 256)]        # the last digits depend on what is embedded together
        save(path, partial(np.save, arr=np.concatenate(parts).astype(np.float32)))
        count += len(some)
    return {'articles': count}

# -----------------------------------------------------------------------------
# clusters

def log_odds(counts):
    """Of each word in a topic [topics, words]."""
    return np.log(counts / (counts.sum(1, keepdims=True) - counts))

def distinctive(texts, labels, n_topics, n_words=15):
    """Words that tell each topic from the others: log-odds of the articles that hold them, over its standard
    error, with all topics as the prior (Monroe, Colaresi & Quinn 2008, section 3.3.1). [topic][n_words]."""
    from sklearn.feature_extraction.text import CountVectorizer
    counter = CountVectorizer(max_features=20_000, stop_words='english', binary=True,
                              token_pattern=r'[^\W\d_]{3,}')
    try:
        counts = counter.fit_transform(texts)               # [articles, words]
    except ValueError:
        raise SystemExit('prepare_wiki.py: these articles hold no words to tell topics by') from None
    by_topic = np.eye(n_topics)[labels].T @ counts          # [topics, words]
    total = by_topic.sum(0)
    prior = total / total.sum() * 1_000 + 0.01
    inside = by_topic + prior
    outside = total - by_topic + prior
    z = (log_odds(inside) - log_odds(outside)) / np.sqrt(1 / inside + 1 / outside)
    best = np.argsort(-z)[:, :n_words]
    return counter.get_feature_names_out()[best].tolist()

def cluster(cfg, folder, source_folder, embed_folder, made_of, ids, n):
    """K-means; clusters.json with the labels and what they are `made_of`, topics.md for a person. ids: of the
    articles, their digest."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score
    x = np.concatenate([np.load(path) for path in chunks(embed_folder, '.npy')])
    titles, texts = zip(*((a['title'], a['text'][:1_000]) for a in articles(source_folder)))
    fits = [KMeans(cfg.n_topics, n_init=3, random_state=cfg.seed + i).fit(x)
            for i in tqdm(range(3), desc='clusters', disable=None)]
    ami = [adjusted_mutual_info_score(a.labels_, b.labels_) for a, b in itertools.combinations(fits, 2)]
    agreement = ', '.join(f'{a:.2f}' for a in ami)
    labels = fits[0].labels_
    sizes = np.bincount(labels, minlength=cfg.n_topics).tolist()
    share = max(sizes) / n
    words = distinctive(texts, labels, cfg.n_topics)

    nearest = []
    text = (f'# {cfg.n_topics} topics of {n:,} articles\n\nK-means of {made_of["embedder"]} embeddings. '
            f'Adjusted mutual information between three seeds: {agreement}. Largest topic: {share:.0%}.\n')
    for k, centre in enumerate(fits[0].cluster_centers_):
        mine = np.flatnonzero(labels == k)
        order = np.argsort(((x[mine] - centre) ** 2).sum(1))
        nearest.append([titles[i] for i in mine[order[:10]]])
        text += (f'\n## Topic {k}: {", ".join(words[k][:3])}\n\n{sizes[k]:,} articles, {sizes[k] / n:.1%}\n\n'
                 f'Words: {", ".join(words[k])}\n\nNearest: {"; ".join(nearest[k])}\n')
    runs.write_json(f'{folder}/clusters.json', {
        'made_of': made_of, 'ids': ids, 'articles': n, 'sizes': sizes, 'words': words, 'ami': ami,
        'labels': base64.b64encode(zlib.compress(labels.astype(np.uint8), 9)).decode(),
        'nearest': nearest, 'largest_share': share})
    runs.write_text(f'{folder}/topics.md', text)
    if share > 0.3:
        print(f'WARNING: the largest topic holds {share:.0%} of the articles; try another embedder or n_topics')
    print(f'clusters  largest {share:.0%}, adjusted mutual information between seeds {agreement}; '
          f'{folder}/topics.md shows what they are')
    return {'articles': n}

# -----------------------------------------------------------------------------
# tokens

def train_tokenizer(cfg, folder, source_folder, val):
    """Byte-level BPE of the training articles, tokenizer.json: whatever the text, decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=sys.stderr.isatty())
    n_train = int((~val).sum())
    texts = (a['text'] for a in itertools.compress(articles(source_folder), ~val))
    tokenizer.train_from_iterator(texts, trainer, length=n_train)
    found = tokenizer.get_vocab_size()
    if found < cfg.vocab_size:
        print(f'WARNING: these articles give {found:,} tokens, not {cfg.vocab_size:,}; the rest will never occur')
    runs.write_text(f'{folder}/tokenizer.json', tokenizer.to_str())
    return {'articles': n_train, 'found': found}

def encode(cfg, folder, source_folder, tokenizer_folder, n):
    """The tokens of all articles: files of CHUNK articles, uint16 tokens one after the other, and lengths."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(f'{tokenizer_folder}/tokenizer.json')
    count = 0
    for path, some in unmade(folder, '.npz', source_folder, n):
        found = tokenizer.encode_batch_fast([a['text'] for a in some])
        ids = [np.array(e.ids, np.uint16) for e in found]
        save(path, partial(np.savez, tokens=np.concatenate(ids), lengths=[len(x) for x in ids]))
        count += len(some)
    return {'articles': count}

def read_tokens(folder):
    """uint16 tokens of all articles, one after the other, and the lengths [n]."""
    parts = [dict(np.load(path)) for path in chunks(folder, '.npz')]
    tokens = np.concatenate([part['tokens'] for part in parts])
    lengths = np.concatenate([part['lengths'] for part in parts])
    return tokens, lengths

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

def draw(rng, pool, rest, taken, want, most, least, last):
    """
    The next piece of a row, of an article of the pool that is not taken yet: (article, tokens), or (None, 0).

    rest: tokens left of each article [n]. A piece has `want` tokens, unless that leaves an end shorter than
    `least`: then it has all that is left, if that is at most `most`, or that without `least`. The `last` piece of a
    row has to fill it, so it always has `want`. If no article of 60 will do, one is taken that loses its end.
    """
    spare = None, 0
    for _ in range(60):
        a = pool[rng.integers(len(pool))]
        r = rest[a]
        if a in taken:
            continue
        if r == want or r >= want + least:
            return a, want
        if not last and r <= most:
            return a, r
        if not last and r >= 2 * least:
            return a, r - least
        if r > want:
            spare = a, want
    return spare

def pack(rng, lengths, labels, width, low, high, least, desc=''):
    """
    Cut articles into rows of `width` tokens: int64 [pieces, 4] of (row, article, start, length), by row.

    lengths, labels: tokens and topic of each article [n]. A row has U{low..high} pieces, neighbours of different
    topics, each of one article, no article twice, at least `least` tokens each; a token is used at most once. An
    article is cut from its beginning on, and never so that an end shorter than `least` is left if it can be helped.
    """
    K = int(labels.max()) + 1
    rest = lengths.astype(np.int64)                         # tokens left of each article
    index = np.zeros(len(lengths), np.int64)                # of an article in its pool
    pools = []
    for k in range(K):
        mine = rng.permutation(np.flatnonzero((labels == k) & (lengths >= least)))
        index[mine] = np.arange(len(mine))
        pools.append(list(mine))
    left = np.array([rest[p].sum() for p in pools], float)  # tokens of each topic
    bar = tqdm(total=int(left.sum()), desc=desc, unit='token', disable=None)

    pieces = []
    row = failed = 0
    while failed < 100 and np.count_nonzero(left) > 1:
        if row % 500 == 0:
            weights = next_topic_weights(left)
        n = rng.integers(low, high + 1)
        free = width - n * least                            # spread over the pieces: a uniform composition
        bars = np.sort(rng.choice(free + n - 1, n - 1, replace=False))
        wanted = np.diff(bars, prepend=-1, append=free + n - 1) - 1 + least
        room, mine, topic = width, {}, -1
        for i in range(n):
            p = np.where((left > 0) & (np.arange(K) != topic), weights + 1e-9, 0)
            topic = rng.choice(K, p=p / p.sum())
            last = i == n - 1
            most = room - least * (n - 1 - i)               # leaves room for the other pieces
            want = room if last else min(wanted[i], most)
            article, size = draw(rng, pools[topic], rest, mine, want, most, least, last)
            if not size:
                break
            mine[article] = size
            room -= size
        if room:
            failed += 1                                     # nothing was taken; another draw may do
            continue

        failed = 0
        for a, size in mine.items():
            k = labels[a]
            pieces.append((row, a, lengths[a] - rest[a], size))
            rest[a] -= size
            left[k] -= size
            if rest[a] < least:
                left[k] -= rest[a]
                last = pools[k][-1]                         # takes its place
                pools[k][index[a]] = last
                index[last] = index[a]
                pools[k].pop()
        bar.update(width)
        row += 1
    bar.close()
    return np.array(pieces, np.int64).reshape(-1, 4)

def make_rows(cfg, name, mask, tokens, lengths, labels):
    """Tokens uint16 and topics uint8 [rows, width] of a split, the articles of mask [n], and its counts. tokens: of
    all articles, one after the other; lengths, labels: of each article [n]."""
    width = cfg.block_size + 1
    low, high = VAL_SEGMENTS if name == 'val' else (cfg.min_segments, cfg.max_segments)
    rng = np.random.default_rng([cfg.seed, 3 + (name == 'val')])
    mine = np.flatnonzero(mask)
    pieces = pack(rng, lengths[mine], labels[mine], width, low, high, cfg.min_segment_len, f'pack {name}')
    if not len(pieces):
        raise SystemExit(f'{cfg.source}: {len(mine)} {name} articles do not make one row of {low}-{high} segments '
                         f'in {width} tokens; give more, or lower block_size, min_segments or min_segment_len')
    pieces[:, 1] = mine[pieces[:, 1]]

    n_rows = pieces[-1, 0] + 1
    x = np.empty((n_rows, width), np.uint16)                # filled in place, as a copy would be large
    z = np.empty((n_rows, width), np.uint8)
    where = np.argsort(rng.permutation(n_rows))             # of each row: they are shuffled
    starts = np.cumsum(lengths) - lengths
    at = 0
    for row, a, start, size in pieces.tolist():
        first = starts[a] + start
        x[where[row], at:at + size] = tokens[first:first + size]
        z[where[row], at:at + size] = labels[a]
        at = (at + size) % width

    total = int(lengths[mine].sum())
    print(f'{name:10}{len(x):,} rows, {x.size / total:.1%} of {total:,} tokens')
    if name == 'train' and x.size < 0.95 * total:
        most = np.bincount(labels[mine], lengths[mine]).max() / total
        print(f'WARNING: {1 - x.size / total:.1%} of the training tokens are not used; the largest topic has '
              f'{most:.0%} of them (a half is the most that can be mixed); or lower block_size or min_segment_len')
    return x, z, {'articles': len(mine), 'tokens': total, 'used': x.size, 'unused': total - x.size}

# -----------------------------------------------------------------------------

def main(cfg):
    """Writes data_dir unless it is there with the same parameters; returns the folder."""
    check(cfg)
    try:
        meta = parameters(cfg)
        if shards.is_there(cfg.data_dir, meta):
            shards.read(cfg.data_dir)
            if cfg.topics_from:
                labels = [read_topics(f, cfg.n_topics)['labels'] for f in (cfg.data_dir, cfg.topics_from)]
                if not np.array_equal(*labels):
                    raise SystemExit(f'{cfg.data_dir}: its articles have other topics than those of '
                                     f'{cfg.topics_from}; delete it or choose another data_dir')
            print(f'{cfg.data_dir} is there, with these parameters')
            return cfg.data_dir
        os.makedirs(cfg.work_dir, exist_ok=True)
        with FileLock(f'{cfg.work_dir}/lock', timeout=0):
            prepare(cfg, meta)
        return cfg.data_dir
    except Timeout:
        raise SystemExit(f'{cfg.work_dir}: another prepare_wiki.py is at work there; wait for it, or choose '
                         'another --work_dir') from None
    except OSError as e:
        raise SystemExit(f'{e.filename or cfg.work_dir}: {e.strerror or e}; make room or choose another '
                         '--work_dir; the same command goes on') from None
    except KeyboardInterrupt:
        raise SystemExit(f'{cfg.work_dir}: stopped; the same command goes on') from None

def find_topics(cfg, meta, read, source_folder, ids, n):
    """The folder of clusters.json and topics.md: topics_from, or that of the clusters phase. ids: digest of the n
    articles; read: what they are made of."""
    if cfg.topics_from:
        return cfg.topics_from
    embedding = read | {'embedder': meta.get('embedder_digest', cfg.embedder)}
    if cfg.embedder == 'lsa':
        embedding['seed'] = cfg.seed
    else:
        embedding['embed_tokens'] = cfg.embed_tokens
    embed_folder, _ = phase(cfg, 'embed', embedding, embed, source_folder, n)
    params = embedding | {'n_topics': cfg.n_topics, 'seed': cfg.seed}
    made_of = {k: meta[k] for k in ('embedder', 'embed_tokens', 'n_topics', 'embedder_digest') if k in meta}
    folder, _ = phase(cfg, 'clusters', params, cluster, source_folder, embed_folder, made_of, ids, n)
    return folder

def prepare(cfg, meta):
    """The six phases; writes data_dir."""
    if not hub(cfg) and 'source_digest' not in meta:
        raise SystemExit(f'{cfg.source}: no .parquet or .jsonl file there; --source= is a file, a folder, a glob '
                         'or a hub dataset such as wikimedia/wikipedia')
    read = {'source': meta.get('source_digest', [cfg.source, cfg.subset]), 'max_articles': cfg.max_articles,
            'min_chars': cfg.min_chars}
    source_folder, facts = phase(cfg, 'articles', read, collect)
    n = facts['kept']
    if n <= cfg.n_topics:
        raise SystemExit(f'{cfg.source}: {n} articles after cleaning ({facts["counts"]["read"]} read), too few '
                         f'for {cfg.n_topics} topics; give more, or lower --n_topics or --min_chars')
    ids, n_bytes = [], 0
    for a in articles(source_folder):
        ids.append(a['id'])
        n_bytes += len(a['text'].encode())
    if len(ids) != n:
        raise SystemExit(f'{source_folder}: is not whole, though it was done; delete that folder, and the same '
                         'command goes on')
    if len(set(ids)) < n:
        print(f'WARNING: {n - len(set(ids)):,} articles have the id of another; val_ids of meta.json is ambiguous')

    ids_digest = hashlib.sha256('\n'.join(ids).encode()).hexdigest()[:16]
    topics_folder = find_topics(cfg, meta, read, source_folder, ids_digest, n)
    clusters = read_topics(topics_folder, cfg.n_topics)
    if clusters.get('ids') != ids_digest:
        raise SystemExit(f'{topics_folder}: its topics are of {len(clusters["labels"]):,} other articles than '
                         f'these {n:,}; give the same source, max_articles and min_chars, or leave topics_from out')

    val = np.zeros(n, bool)                                 # the split, by article, before anything is packed
    n_val = min(max(1, round(cfg.val_share * n)), n - 1)
    val[np.random.default_rng([cfg.seed, 0]).permutation(n)[:n_val]] = True
    split = read | {'val_share': cfg.val_share, 'seed': cfg.seed, 'vocab_size': cfg.vocab_size}
    tokenizer_folder, _ = phase(cfg, 'tokenizer', split, train_tokenizer, source_folder, val)
    tokens_folder, _ = phase(cfg, 'tokens', split, encode, source_folder, tokenizer_folder, n)

    clock = time.time()
    tokens, lengths = read_tokens(tokens_folder)
    arrays, used = {}, {}
    for name, mask in (('train', ~val), ('val', val)):
        arrays[name], arrays[f'{name}_topics'], used[name] = make_rows(
            cfg, name, mask, tokens, lengths, clusters['labels'])
    meta['corpus'] = {'articles': n, 'counts': facts['counts'], 'tokens': used,
                      'topics': {k: clusters[k] for k in ('sizes', 'largest_share', 'ami')},
                      'bytes_per_token': n_bytes / len(tokens), 'val_ids': list(itertools.compress(ids, val))}
    meta['references'] = {'uniform': np.log(cfg.vocab_size), 'bigram': None, 'filter': None, 'oracle': None}
    shards.write(cfg.data_dir, arrays, meta, {
        'tokenizer.json': tokenizer_folder, 'clusters.json': topics_folder, 'topics.md': topics_folder})
    print(f'rows      {sum(counts["used"] for counts in used.values()):,} tokens in '
          f'{time.time() - clock:,.0f} s; {cfg.data_dir}')

if __name__ == '__main__':
    # a config file of an experiment means its runs by out_dir; on this command line it can only be the dataset
    main(configure(__file__, [arg.replace('--out_dir=', '--data_dir=', 1) for arg in sys.argv[1:]]))
