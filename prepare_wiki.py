"""
Wikipedia -> topics by meaning -> byte-level BPE -> rows of several topics, in the format of shards.py.

    python prepare_wiki.py config/wiki.py                                        # streams wikimedia/wikipedia
    python prepare_wiki.py --source=articles.parquet --embedder=lsa --data_dir=data/my_wiki

Six phases: articles (cleaned, without stubs and duplicates), embeddings, clusters, tokenizer, tokens, rows. Each keeps
its work in work_dir under a name made of its parameters: what is done is skipped, what was stopped goes on, and
another n_topics reuses the embeddings. Topics are labels given to all articles; the tokenizer and the training rows
come from the training articles alone. 64,000 articles on two CPU cores: see LOG.md.

Machines differ in the last digits of embeddings, so in a few labels, and then in every row. --topics_from=results/wiki
takes the labels that clusters.json keeps, for the same articles: the same dataset to the byte, without a model.
"""
import base64
import contextlib
import fcntl
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

import numpy as np
from tqdm import tqdm

import shards
from configurator import configure

# -----------------------------------------------------------------------------
# config

source = 'wikimedia/wikipedia'      # hub dataset, streamed; or parquet or jsonl: a file, a folder or a glob
subset = '20231101.en'              # of a hub dataset
max_articles = 500_000              # articles kept, at most
min_chars = 500                     # shorter articles are stubs
embedder = 'all-MiniLM-L6-v2'       # sentence-transformers model or local folder; lsa = TF-IDF and SVD, offline
embed_tokens = 128                  # of an article that the embedder reads, from its beginning
n_topics = 8                        # clusters
topics_from = ''                    # folder with clusters.json and topics.md: the same articles get its topics again
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

VAL_SEGMENTS = (2, 4)       # not a knob: validation rows are cut alike in every dataset
CHUNK = 2_000               # articles in a file of the work folder: what a stopped phase loses
LSA_CHARS, LSA_DIM = 4_000, 128
TAIL = re.compile(r'^[^\w\n]*(see also|references|external links|further reading|notes|bibliography)[^\w\n]*$',
                  re.I | re.M)

def parameters(cfg):
    """What a dataset is built from, as meta.json keeps it: another value is another dataset. Files and folders by their
    name and a fingerprint, which is left out where they are not here: a dataset may be used elsewhere."""
    keys = ('source', 'subset', 'max_articles', 'min_chars', 'embedder', 'embed_tokens', 'n_topics', 'vocab_size',
            'block_size', 'val_share', 'min_segments', 'max_segments', 'min_segment_len', 'seed')
    meta = {'kind': 'wiki', **{key: getattr(cfg, key) for key in keys}}
    if not hub(cfg):
        meta['source'] = os.path.basename(os.path.normpath(cfg.source))
    source_files = [] if hub(cfg) else files_of(cfg)
    if source_files:
        meta['source_digest'] = fingerprint(source_files)
    if cfg.topics_from:
        return meta | read_topics(cfg.topics_from, cfg.n_topics)['made_of']
    if os.path.isdir(cfg.embedder):
        meta['embedder'] = os.path.basename(os.path.normpath(cfg.embedder))
        files = glob.glob(os.path.join(glob.escape(cfg.embedder), '**'), recursive=True)
        meta['embedder_digest'] = fingerprint(sorted(f for f in files if os.path.isfile(f)))
    return meta

def read_topics(folder, n_topics):
    """clusters.json of a folder, its 'labels' as an array uint8 [articles]."""
    path = os.path.join(folder, 'clusters.json')
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
        found['labels'] = np.frombuffer(zlib.decompress(base64.b64decode(found['labels'])), np.uint8)
        there, _ = found['made_of']['n_topics'], found['ids']
        os.stat(os.path.join(folder, 'topics.md'))
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as e:
        raise SystemExit(f'{path}: no topics there ({type(e).__name__}: {e}); topics_from is a folder with the '
                         'clusters.json and the topics.md of a dataset that prepare_wiki.py has made (and a folder '
                         'of work_dir from before 2026-11-25 is to be deleted)') from None
    if there != n_topics:
        raise SystemExit(f'{path}: has {there} topics, but n_topics = {n_topics}')
    return found

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
    row, most = cfg.block_size + 1, max(cfg.max_segments, VAL_SEGMENTS[1])
    counts = ('max_articles', 'embed_tokens', 'block_size', 'min_segments', 'min_segment_len')
    for wrong, line in (
        *((getattr(cfg, key) < 1, f'{key}={getattr(cfg, key)}: must be at least 1') for key in counts),
        (cfg.seed < 0 or cfg.min_chars < 0, 'seed and min_chars must not be negative'),
        (not cfg.embedder, 'embedder is empty; a sentence-transformers model, a folder of one, or lsa'),
        (not 2 <= cfg.n_topics <= 255, f'n_topics={cfg.n_topics}: choose 2 to 255, labels are uint8'),
        (not 257 <= cfg.vocab_size <= 65535, f'vocab_size={cfg.vocab_size}: choose 257 (bytes, a merge) to 65535'),
        (not 0 < cfg.val_share < 1, f'val_share={cfg.val_share}: choose between 0 and 1'),
        (cfg.min_segments > cfg.max_segments, f'min_segments={cfg.min_segments} is more than {cfg.max_segments}'),
        (most * cfg.min_segment_len > row, f'{most} segments of min_segment_len={cfg.min_segment_len} do not fit in '
         f'{row} tokens (validation rows have up to {VAL_SEGMENTS[1]}); lower min_segment_len'),
    ):
        if wrong:
            raise SystemExit(f'prepare_wiki.py: {line}')

# -----------------------------------------------------------------------------
# the work folder

def place(cfg, name, params):
    """The folder of a phase, named by the phase and its parameters, and what it said when it was done, or None."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]
    folder = os.path.join(cfg.work_dir, f'{name}-{digest}')
    os.makedirs(folder, exist_ok=True)
    for left in glob.glob(os.path.join(glob.escape(folder), '*.tmp*')):        # by a run that was killed
        os.remove(left)
    done = None
    with contextlib.suppress(FileNotFoundError, ValueError):        # ValueError: cut short, so it is not done
        done = json.load(open(os.path.join(folder, 'done.json'), encoding='utf-8'))
    if done:
        print(f'{name:10}done before, in {folder}')
    return folder, done

def finish(name, folder, clock, count, unit, **facts):
    """The last file of a phase, which says that it is done, and its throughput on the screen; returns the facts."""
    seconds = time.time() - clock
    shards.write_json(os.path.join(folder, 'done.json'), facts | {'seconds': round(seconds, 1)})
    print(f'{name:10}{count:,} {unit} in {seconds:,.0f} s, {count / max(seconds, 1e-3):,.0f} a second')
    return facts

def save(path, write):
    """A file, all or nothing: write(path of a temporary) and rename."""
    temporary = f'{path}.{os.getpid()}.tmp{os.path.splitext(path)[1]}'
    write(temporary)
    os.replace(temporary, path)

def damaged(folder):
    return SystemExit(f'{folder}: is not whole, though it was done; delete that folder, and the same command goes on')

def chunks(folder, suffix):
    """The numbered files of a phase, in order."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f'[0-9]*[0-9]{suffix}')))

def articles(folder):
    """{'id', 'title', 'text', ...} of every article kept, one after the other."""
    for path in chunks(folder, '.jsonl'):
        with open(path, encoding='utf-8') as f:
            for number, line in enumerate(f):
                try:
                    article = json.loads(line)
                except ValueError:
                    raise damaged(folder) from None
                if number:                                  # the first tells how far the source was read
                    yield article

def rest_of(folder, done):
    """(number, articles) of each file of CHUNK articles that a phase has still to make: the first `done` are there."""
    stream = itertools.islice(articles(folder), done * CHUNK, None)
    return enumerate(iter(lambda: list(itertools.islice(stream, CHUNK)), []), done)

# -----------------------------------------------------------------------------
# articles

def hub(cfg):
    """Whether the source is a dataset of the hub: owner/name, and nothing of that name here."""
    return bool(re.fullmatch(r'[\w.-]+/[\w.-]+', cfg.source)) and not os.path.exists(cfg.source) \
        and not cfg.source.endswith(('.parquet', '.jsonl'))

def files_of(cfg):
    """The files of a local source, sorted, without what this script writes itself; [] where there are none."""
    if os.path.isfile(cfg.source):
        found = [cfg.source]
    else:
        at = os.path.join(glob.escape(cfg.source), '**', '*') if os.path.isdir(cfg.source) else cfg.source
        found = glob.glob(at, recursive=True)
    own = re.compile(r'articles-[0-9a-f]{10}.\d{5}\.jsonl$')
    return sorted(f for f in found if f.endswith(('.parquet', '.jsonl')) and os.path.isfile(f) and not own.search(f))

def records(cfg, skip):
    """The rows of the source from number `skip` on: dicts with id, title and text."""
    if hub(cfg):
        try:
            import datasets                                 # only here: nothing else needs it
            stream = datasets.load_dataset(cfg.source, cfg.subset, split='train', streaming=True)
            missing = {'id', 'title', 'text'} - set(stream.column_names or next(iter(stream)))
            yield from stream.skip(skip) if not missing else ()
        except Exception as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            raise SystemExit(f'{cfg.source} ({cfg.subset}): cannot be read from the hub ({reason}); check the name and '
                             'the network, or give local files with --source=; the same command goes on') from None
        if missing:
            raise SystemExit(f'{cfg.source} ({cfg.subset}): no column {", ".join(sorted(missing))}; id, title and text '
                             'are needed')
        return
    def rows(path):
        if path.endswith('.parquet'):
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path) as file:
                missing = {'id', 'title', 'text'} - set(file.schema_arrow.names)
                if missing:
                    raise SystemExit(f'{path}: no column {", ".join(sorted(missing))} (it has '
                                     f'{", ".join(file.schema_arrow.names)}); id, title and text are needed')
                for batch in file.iter_batches(500, columns=['id', 'title', 'text']):
                    yield from batch.to_pylist()
        else:
            with open(path, encoding='utf-8-sig') as f:     # with or without a byte order mark
                for number, line in enumerate(f, 1):
                    if not line.strip():
                        continue
                    try:
                        record = json.loads(line)
                    except ValueError:
                        raise SystemExit(f'{path}, line {number}: is not JSON; one article a line is needed') from None
                    missing = {'id', 'title', 'text'} - set(record if isinstance(record, dict) else ())
                    if missing:
                        raise SystemExit(f'{path}, line {number}: no {", ".join(sorted(missing))}')
                    yield record
    def all_rows():
        for path in files_of(cfg):
            try:
                yield from rows(path)
            except UnicodeDecodeError:
                raise SystemExit(f'{path}: is not UTF-8 text; convert it') from None
            except (OSError, ValueError) as e:              # pyarrow's errors are ValueErrors
                raise SystemExit(f'{path}: cannot be read ({str(e).splitlines()[0][:200]})') from None
    yield from itertools.islice(all_rows(), skip, None)

def clean(text):
    """The text without leftover markup, formula names, the sections after the article and runs of blanks."""
    text = unicodedata.normalize('NFC', text or '')
    text = re.sub(r'<[^<>\n]{1,80}>|\bformula_\d+\b|\{\{[^{}]*\}\}|\[\[|\]\]', '', text)
    tail = TAIL.search(text, len(text) // 4)                # a heading that stands alone, not an early mention
    text = text[:tail.start()] if tail else text
    return re.sub(r'\n\s*\n+', '\n\n', re.sub(r'[^\S\n]+', ' ', text)).strip()

def hashes(text, opening=200):
    """(exact, near): 64-bit hashes of all letters and digits, in lower case, and of the first ones. Articles that
    differ in a name of their opening are not near: that would take more than hashes."""
    plain = re.sub(r'\W+', '', text.casefold())
    return [int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest()) for part in (plain, plain[:opening])]

def collect(cfg, folder):
    """The articles phase: clean, without stubs and duplicates, in files of CHUNK."""
    clock, seen, kept = time.time(), (set(), set()), 0
    counts = {'read': 0, 'stub': 0, 'duplicate': 0, 'near duplicate': 0}
    for path in chunks(folder, '.jsonl'):                   # a run that was stopped
        with open(path, encoding='utf-8') as f:
            counts = json.loads(next(f))
            for article in map(json.loads, f):
                kept += 1
                for known, one in zip(seen, article['hashes']):
                    known.add(one)
    before, chunk = kept, []
    def flush():
        path = os.path.join(folder, f'{len(chunks(folder, ".jsonl")):05d}.jsonl')
        lines = (json.dumps(line, ensure_ascii=False) for line in (counts, *chunk))
        def write(temporary):
            with open(temporary, 'w', encoding='utf-8', errors='replace') as f:
                f.writelines(line + '\n' for line in lines)
        save(path, write)
        chunk.clear()
    with tqdm(total=cfg.max_articles, initial=kept, desc='articles', unit='article', disable=None) as bar:
        for record in records(cfg, counts['read']) if kept < cfg.max_articles else ():
            counts['read'] += 1
            if not isinstance(record['text'], (str, type(None))):
                raise SystemExit(f'{cfg.source}: the text of article {record["id"]} is a '
                                 f'{type(record["text"]).__name__}, not a string')
            text = clean(record['text'])
            exact, near = hashes(text)
            fate = ('stub' if len(text) < max(1, cfg.min_chars) else 'duplicate' if exact in seen[0]
                    else 'near duplicate' if near in seen[1] else None)
            if fate:
                counts[fate] += 1
                continue
            seen[0].add(exact)
            seen[1].add(near)
            chunk.append({'id': str(record['id']), 'title': str(record['title'] or ''), 'text': text,
                          'hashes': [exact, near]})
            kept += 1
            bar.update()
            if len(chunk) == CHUNK:
                flush()
            if kept == cfg.max_articles:
                break
    if chunk:
        flush()
    if kept <= cfg.n_topics:
        raise SystemExit(f'{cfg.source}: {kept} articles after cleaning ({counts["read"]} read), too few for '
                         f'{cfg.n_topics} topics; give more, or lower --n_topics or --min_chars')
    print('articles  ' + ', '.join(f'{v:,} {k}' for k, v in counts.items()) + f': {kept:,} kept')
    return finish('articles', folder, clock, kept - before, 'articles', counts=counts, kept=kept)

# -----------------------------------------------------------------------------
# embeddings

def beginning(article, chars):
    return f'{article["title"]}\n{article["text"][:chars]}'

def embed(cfg, source_folder, folder, n):
    """Unit vectors of all articles, float32 [n, d], a file of CHUNK at a time."""
    clock = time.time()
    if cfg.embedder == 'lsa':
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize
        texts = tqdm((beginning(a, LSA_CHARS) for a in articles(source_folder)), desc='TF-IDF', total=n, disable=None)
        words = TfidfVectorizer(max_features=50_000, max_df=0.5, stop_words='english', sublinear_tf=True,
                                dtype=np.float32)
        try:
            weights = words.fit_transform(texts)
        except ValueError as e:
            raise SystemExit(f'{cfg.source}: lsa finds no words to tell articles apart ({e})') from None
        if min(weights.shape) < 3:
            raise SystemExit(f'{cfg.source}: lsa finds no words to tell articles apart, but {weights.shape[1]}')
        svd = TruncatedSVD(min(LSA_DIM, min(weights.shape) - 1), random_state=cfg.seed)
        vectors = normalize(svd.fit_transform(weights)).astype(np.float32)
        save(os.path.join(folder, '00000.npy'), lambda path: np.save(path, vectors))
        return finish('embed', folder, clock, n, 'articles')
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(cfg.embedder, device=cfg.device or None)
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise SystemExit(f'embedder {cfg.embedder!r} cannot be loaded ({reason}); name a sentence-transformers model '
                         'or a local folder of one, check the network, or choose --embedder=lsa') from None
    model.max_seq_length = min(cfg.embed_tokens, model.max_seq_length or cfg.embed_tokens)
    gpus = torch.cuda.device_count() if not cfg.device else 0
    pool = model.start_multi_process_pool([f'cuda:{i}' for i in range(gpus)]) if gpus > 1 else None
    done = len(chunks(folder, '.npy'))
    n_before = min(n, done * CHUNK)
    try:
        with tqdm(total=n, initial=n_before, desc='embed', unit='article', disable=None) as bar:
            for i, some in rest_of(source_folder, done):
                texts, parts = [beginning(a, 8 * cfg.embed_tokens) for a in some], []
                for j in range(0, len(texts), CHUNK if pool else 256):
                    part = texts[j:j + (CHUNK if pool else 256)]
                    parts.append(model.encode(part, batch_size=64, normalize_embeddings=True, pool=pool,
                                              show_progress_bar=False))
                    bar.update(len(part))
                vectors = np.concatenate(parts).astype(np.float32)
                save(os.path.join(folder, f'{i:05d}.npy'), lambda path: np.save(path, vectors))
    finally:
        if pool:
            model.stop_multi_process_pool(pool)
    return finish('embed', folder, clock, n - n_before, 'articles')

# -----------------------------------------------------------------------------
# clusters

def distinctive(texts, labels, n_topics, n_words=15):
    """Words that tell each topic from the others: log-odds of the articles that hold them, over its standard error,
    with all topics as the prior (Monroe, Colaresi & Quinn 2008, section 3.3.1). [topic][n_words]."""
    from sklearn.feature_extraction.text import CountVectorizer
    counter = CountVectorizer(max_features=20_000, stop_words='english', binary=True, token_pattern=r'[^\W\d_]{3,}')
    try:
        counts = counter.fit_transform(texts)               # [articles, words]
    except ValueError:
        raise SystemExit('prepare_wiki.py: these articles hold no words to tell topics by') from None
    by_topic = np.stack([np.asarray(counts[labels == k].sum(0)).ravel() for k in range(n_topics)]).astype(float)
    prior = by_topic.sum(0) / by_topic.sum() * 1_000 + 0.01
    odds = lambda y: np.log((y + prior) / ((y + prior).sum() - (y + prior)))
    z = [(odds(y) - odds(by_topic.sum(0) - y)) / np.sqrt(1 / (y + prior) + 1 / (by_topic.sum(0) - y + prior))
         for y in by_topic]
    names = counter.get_feature_names_out()
    return [[str(w) for w in names[np.argsort(-row)[:n_words]]] for row in z]

def cluster(made_of, ids, cfg, source_folder, embed_folder, folder, n):
    """K-means; clusters.json with the labels and what they are `made_of`, topics.md for a person. ids: of the articles,
    their digest."""
    from sklearn.cluster import KMeans
    from sklearn.manifold import TSNE
    from sklearn.metrics import adjusted_mutual_info_score
    clock = time.time()
    x = np.concatenate([np.load(path) for path in chunks(embed_folder, '.npy')])
    beginnings = [(a['title'], a['text'][:1_000]) for a in articles(source_folder)]
    if not len(x) == len(beginnings) == n:
        raise damaged(embed_folder if len(x) != n else source_folder)
    titles, texts = zip(*beginnings)
    fits = [KMeans(cfg.n_topics, n_init=3, random_state=cfg.seed + i).fit(x)
            for i in tqdm(range(3), desc='clusters', unit='seed', disable=None)]
    ami = [float(adjusted_mutual_info_score(a.labels_, b.labels_)) for a, b in itertools.combinations(fits, 2)]
    labels, centres = fits[0].labels_, fits[0].cluster_centers_
    sizes = np.bincount(labels, minlength=cfg.n_topics)
    words = distinctive(texts, labels, cfg.n_topics)
    near = [np.where(labels == k)[0][np.argsort(((x[labels == k] - centres[k]) ** 2).sum(1))[:10]]
            for k in range(cfg.n_topics)]
    share = float(sizes.max() / n)
    sample = np.sort(np.random.default_rng([cfg.seed, 2]).permutation(n)[:2_000])
    tsne = TSNE(init='pca', random_state=cfg.seed, perplexity=min(30, (len(sample) - 1) / 3))
    picture = tsne.fit_transform(x[sample])
    shards.write_json(os.path.join(folder, 'clusters.json'), {
        'made_of': made_of, 'ids': ids, 'articles': n, 'sizes': sizes.tolist(), 'words': words, 'ami': ami,
        'labels': base64.b64encode(zlib.compress(labels.astype(np.uint8).tobytes(), 9)).decode(),
        'nearest': [[titles[i] for i in which] for which in near], 'largest_share': share,
        'picture': [[round(float(a), 2), round(float(b), 2), int(k)] for (a, b), k in zip(picture, labels[sample])]})
    lines = [f'# {cfg.n_topics} topics of {n:,} articles', '',
             f'K-means of {made_of["embedder"]} embeddings. Adjusted mutual information between three seeds: '
             + ', '.join(f'{a:.2f}' for a in ami) + f'. Largest topic: {share:.0%}.', '']
    for k in range(cfg.n_topics):
        lines += [f'## Topic {k}: {", ".join(words[k][:3])}', '', f'{sizes[k]:,} articles, {sizes[k] / n:.1%}', '',
                  f'Words: {", ".join(words[k])}', '', f'Nearest: {"; ".join(titles[i] for i in near[k])}', '']
    shards.write_text(os.path.join(folder, 'topics.md'), '\n'.join(lines))
    if share > 0.3:
        print(f'WARNING: the largest topic holds {share:.0%} of the articles; try another embedder or n_topics')
    print(f'clusters  largest {share:.0%}, adjusted mutual information between seeds '
          + ', '.join(f'{a:.2f}' for a in ami) + f'; {os.path.join(folder, "topics.md")} shows what they are')
    return finish('clusters', folder, clock, n, 'articles')

# -----------------------------------------------------------------------------
# tokens

def train_tokenizer(cfg, source_folder, folder, val):
    """Byte-level BPE of the training articles, tokenizer.json: whatever the text, decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    clock = time.time()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=sys.stderr.isatty())
    texts = (a['text'] for a, is_val in zip(articles(source_folder), val) if not is_val)
    tokenizer.train_from_iterator(texts, trainer, length=int((~val).sum()))
    found = tokenizer.get_vocab_size()
    if found < cfg.vocab_size:
        print(f'WARNING: these articles give {found:,} tokens, not {cfg.vocab_size:,}; the rest will never occur')
    shards.write_text(os.path.join(folder, 'tokenizer.json'), tokenizer.to_str())
    return finish('tokenizer', folder, clock, int((~val).sum()), 'articles', found=found)

def encode(cfg, source_folder, tokenizer_folder, folder, n):
    """The tokens of all articles: files of CHUNK articles, uint16 tokens one after the other, and lengths."""
    from tokenizers import Tokenizer
    clock = time.time()
    tokenizer = Tokenizer.from_file(os.path.join(tokenizer_folder, 'tokenizer.json'))
    done = len(chunks(folder, '.npz'))
    n_before = min(n, done * CHUNK)
    with tqdm(total=n, initial=n_before, desc='tokens', unit='article', disable=None) as bar:
        for i, some in rest_of(source_folder, done):
            ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast([a['text'] for a in some])]
            save(os.path.join(folder, f'{i:05d}.npz'),
                 lambda path: np.savez(path, tokens=np.concatenate(ids), lengths=[len(x) for x in ids]))
            bar.update(len(some))
    return finish('tokens', folder, clock, n - n_before, 'articles')

# -----------------------------------------------------------------------------
# rows

def next_topic_weights(tokens):
    """Weights w [K] of a draw without repeats, P(d | c) = w_d / (1 - w_c), that visits topics in proportion to `tokens`
    [K], as far as that can be: the visits are proportional to w_c (1 - w_c)."""
    share = tokens / tokens.sum()
    w = share.copy()
    for _ in range(50):
        w = share / np.maximum(1 - w, 0.5)                  # half of all segments is the most a topic can have
        w /= w.sum()
    return w

def pack(rng, lengths, labels, width, low, high, least, desc=''):
    """
    Cut articles into rows of `width` tokens: int64 [pieces, 4] of (row, article, start, length), by row.

    lengths, labels: tokens and topic of each article [n]. A row has U{low..high} pieces, neighbours of different
    topics, each of one article, no article twice, at least `least` tokens each; a token is used at most once. An
    article is cut from its beginning on, and never so that an end shorter than `least` is left if it can be helped.
    With low = high = 1 a row holds one topic: as many pieces as it takes, of any length, so that short articles are
    used too.
    """
    rest, at, pieces = lengths.astype(np.int64).copy(), np.zeros(len(lengths), np.int64), []
    K = int(labels.max()) + 1
    if high == 1:
        for k in range(K):
            row, room = len({p[0] for p in pieces}), width
            for a in rng.permutation(np.where(labels == k)[0]):
                while rest[a]:
                    size = min(rest[a], room)
                    pieces.append((row, a, at[a], size))
                    at[a], rest[a], room = at[a] + size, rest[a] - size, room - size
                    if not room:
                        row, room = row + 1, width
            while pieces and room < width and pieces[-1][0] == row:
                pieces.pop()                                # a row that this topic cannot fill
        return np.array(pieces, np.int64).reshape(-1, 4)
    pool = [list(rng.permutation(np.where((labels == k) & (lengths >= least))[0])) for k in range(K)]
    left = np.array([rest[p].sum() for p in pool], float)   # tokens of each topic
    index = np.zeros(len(lengths), np.int64)                # of an article in its pool
    for p in pool:
        index[p] = np.arange(len(p))
    bar = tqdm(total=int(left.sum()), desc=desc, unit='token', disable=None, unit_scale=True)
    row = failed = 0
    while failed < 100 and np.count_nonzero(left) > 1:
        if row % 500 == 0:
            weights = next_topic_weights(left)
        n, room, mine, topic = int(rng.integers(low, high + 1)), width, [], -1
        cuts = np.sort(rng.choice(width - n * least + n - 1, n - 1, replace=False)) - np.arange(n - 1)
        wanted = np.diff(np.concatenate([[0], cuts, [width - n * least]])) + least      # a uniform composition
        for i in range(n):
            p = np.where((left > 0) & (np.arange(K) != topic), weights + 1e-9, 0)
            topic = int(rng.choice(K, p=p / p.sum()))
            most = room - least * (n - 1 - i)               # leaves room for the other pieces
            want = room if i == n - 1 else min(int(wanted[i]), most)
            size, spare = 0, None
            for _ in range(60):
                a = pool[topic][int(rng.integers(len(pool[topic])))]
                r = rest[a]
                if any(a == b for b, _ in mine):
                    continue
                if r == want or r >= want + least:
                    size = want
                elif i < n - 1 and r <= most:
                    size = r                                # all that is left of it
                elif i < n - 1 and r >= 2 * least:
                    size = r - least                        # else its end would be lost
                elif r > want:
                    spare = a
                    continue
                else:
                    continue
                break
            if not size and spare is not None:
                a, size = spare, want
            if not size:
                break
            mine.append((a, int(size)))
            room -= size
        if room:
            failed += 1                                     # nothing was taken; another draw may do
            continue
        failed = 0
        for a, size in mine:
            pieces.append((row, a, at[a], size))
            k, gone = labels[a], size
            at[a], rest[a] = at[a] + size, rest[a] - size
            if rest[a] < least:
                gone, rest[a] = size + rest[a], 0
                last = pool[k].pop()                        # takes its place
                if last != a:
                    pool[k][index[a]], index[last] = last, index[a]
            left[k] -= gone
            bar.update(int(size))
        row += 1
    bar.close()
    return np.array(pieces, np.int64).reshape(-1, 4)

def rows_of(pieces, tokens, starts, labels, width, rng):
    """Tokens uint16 and topics uint8 [rows, width] of what `pack` cut, rows shuffled. starts: of each article."""
    n_rows = pieces[-1, 0] + 1
    x, z, where = np.empty(n_rows * width, np.uint16), np.empty(n_rows * width, np.uint8), np.empty(n_rows, np.int64)
    where[rng.permutation(n_rows)] = np.arange(n_rows)      # of each row; filled in place, as a copy would be large
    before = 0
    for row, a, start, size in pieces.tolist():
        at = where[row] * width + before
        x[at:at + size], z[at:at + size] = tokens[starts[a] + start:starts[a] + start + size], labels[a]
        before = (before + size) % width
    return x.reshape(-1, width), z.reshape(-1, width)

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
                    raise SystemExit(f'{cfg.data_dir}: its articles have other topics than those of {cfg.topics_from}; '
                                     'delete it or choose another data_dir')
            print(f'{cfg.data_dir} is there, with these parameters')
            return cfg.data_dir
        os.makedirs(cfg.work_dir, exist_ok=True)
        with open(os.path.join(cfg.work_dir, 'lock'), 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # until this process ends, however it ends
            except BlockingIOError:
                raise SystemExit(f'{cfg.work_dir}: another prepare_wiki.py is at work there; wait for it, or choose '
                                 'another --work_dir') from None
            return prepare(cfg, meta)
    except OSError as e:
        raise SystemExit(f'{e.filename or cfg.work_dir}: {e.strerror or e}; make room or choose another --work_dir; '
                         'the same command goes on') from None
    except KeyboardInterrupt:
        raise SystemExit(f'{cfg.work_dir}: stopped; the same command goes on') from None

def prepare(cfg, meta):
    width = cfg.block_size + 1
    if not hub(cfg) and 'source_digest' not in meta:
        raise SystemExit(f'{cfg.source}: no .parquet or .jsonl file there; --source= is a file, a folder, a glob or a '
                         'hub dataset such as wikimedia/wikipedia')
    read = {'source': meta.get('source_digest', [cfg.source, cfg.subset]), 'max_articles': cfg.max_articles,
            'min_chars': cfg.min_chars}
    source_folder, facts = place(cfg, 'articles', read)
    facts = facts or collect(cfg, source_folder)
    n = facts['kept']
    if n <= cfg.n_topics:
        raise SystemExit(f'{cfg.source}: {n} articles, too few for n_topics={cfg.n_topics}')
    ids, n_bytes = [], 0
    for a in articles(source_folder):
        ids.append(a['id'])
        n_bytes += len(a['text'].encode())
    if len(ids) != n:
        raise damaged(source_folder)
    if len(set(ids)) < n:
        print(f'WARNING: {n - len(set(ids)):,} articles have the id of another, so val_ids of meta.json is ambiguous')
    ids_digest = hashlib.sha256('\n'.join(ids).encode('utf-8', 'replace')).hexdigest()[:16]

    embedding = read | {'embedder': meta.get('embedder_digest', cfg.embedder)}
    embedding |= {'seed': cfg.seed} if cfg.embedder == 'lsa' else {'embed_tokens': cfg.embed_tokens}
    topics_folder = cfg.topics_from
    if not topics_folder:
        embed_folder, done = place(cfg, 'embed', embedding)
        done or embed(cfg, source_folder, embed_folder, n)
        topics_folder, done = place(cfg, 'clusters', embedding | {'n_topics': cfg.n_topics, 'seed': cfg.seed})
        made_of = {k: meta[k] for k in ('embedder', 'embed_tokens', 'n_topics', 'embedder_digest') if k in meta}
        done or cluster(made_of, ids_digest, cfg, source_folder, embed_folder, topics_folder, n)
    clusters = read_topics(topics_folder, cfg.n_topics)
    if clusters['ids'] != ids_digest:
        raise SystemExit(f'{topics_folder}: its topics are of {len(clusters["labels"]):,} other articles than these '
                         f'{n:,}; give the same source, max_articles and min_chars, or leave topics_from out')
    labels = clusters['labels']

    val = np.zeros(n, bool)                                 # the split, by article, before anything is packed
    val[np.random.default_rng([cfg.seed, 0]).permutation(n)[:min(max(1, round(cfg.val_share * n)), n - 1)]] = True
    split = read | {'val_share': cfg.val_share, 'seed': cfg.seed, 'vocab_size': cfg.vocab_size}
    tokenizer_folder, done = place(cfg, 'tokenizer', split)
    done or train_tokenizer(cfg, source_folder, tokenizer_folder, val)
    tokens_folder, done = place(cfg, 'tokens', split)
    done or encode(cfg, source_folder, tokenizer_folder, tokens_folder, n)

    clock = time.time()
    tokens, lengths = [], []
    for path in chunks(tokens_folder, '.npz'):
        with np.load(path) as part:
            tokens.append(part['tokens'])
            lengths.append(part['lengths'])
    tokens, lengths = np.concatenate(tokens), np.concatenate(lengths)
    if not len(lengths) == len(labels) == n:
        raise damaged(tokens_folder if len(lengths) != n else topics_folder)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    arrays, used = {}, {}
    for name, mask, low, high in (('train', ~val, cfg.min_segments, cfg.max_segments), ('val', val, *VAL_SEGMENTS)):
        rng = np.random.default_rng([cfg.seed, 3 + (name == 'val')])
        mine = np.where(mask)[0]
        pieces = pack(rng, lengths[mine], labels[mine], width, low, high, cfg.min_segment_len, f'pack {name}')
        if not len(pieces):
            raise SystemExit(f'{cfg.source}: {len(mine)} {name} articles do not make one row of {low}-{high} segments '
                             f'in {width} tokens; give more, or lower block_size, min_segments or min_segment_len')
        pieces[:, 1] = mine[pieces[:, 1]]
        arrays[name], arrays[f'{name}_topics'] = rows_of(pieces, tokens, starts, labels, width, rng)
        total = int(lengths[mine].sum())
        size = arrays[name].size
        used[name] = {'articles': len(mine), 'tokens': total, 'used': size, 'unused': total - size}
        print(f'{name:10}{len(arrays[name]):,} rows, {size / total:.1%} of {total:,} tokens')
        if name == 'train' and size < 0.95 * total:
            most = np.bincount(labels[mine], lengths[mine]).max() / total
            print(f'WARNING: {1 - size / total:.1%} of the training tokens are not used; the largest topic has '
                  f'{most:.0%} of them (a half is the most that can be mixed); or lower block_size or min_segment_len')
    meta['corpus'] = {'articles': n, 'counts': facts['counts'], 'tokens': used,
                      'topics': {k: clusters[k] for k in ('sizes', 'largest_share', 'ami')},
                      'bytes_per_token': n_bytes / len(tokens),
                      'val_ids': [i for i, is_val in zip(ids, val) if is_val]}
    meta['references'] = {'uniform': float(np.log(cfg.vocab_size)), 'bigram': None, 'filter': None, 'oracle': None}
    shards.write(cfg.data_dir, arrays, meta, {
        'tokenizer.json': tokenizer_folder, 'clusters.json': topics_folder, 'topics.md': topics_folder})
    print(f'rows      {sum(used[k]["used"] for k in used):,} tokens in {time.time() - clock:,.0f} s; {cfg.data_dir}')
    return cfg.data_dir

if __name__ == '__main__':
    # a config file of an experiment means its runs by out_dir; on this command line it can only be the dataset
    main(configure(__file__, [arg.replace('--out_dir=', '--data_dir=', 1) for arg in sys.argv[1:]]))
