"""
The one on-disk format of a dataset, and the only code that writes or reads it.

A dataset is a folder of raw arrays without headers, and a meta.json that says what they are:
    train.bin         val.bin          uint16   tokens, rows of block_size + 1
    train_topics.bin  val_topics.bin   uint8    the topic of every token, same rows
                      val_posterior.bin float16  optional: topic posterior of a Bayes filter, [row, position, topic]
Your own labelled tokens become a dataset with
    shards.write(folder, dict(train=..., train_topics=..., val=..., val_topics=...),
                 dict(vocab_size=..., block_size=..., n_topics=...))
"""
import contextlib
import glob
import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np

NAMES = ('train', 'train_topics', 'val', 'val_topics', 'val_posterior')  # order of reading; the last is optional
BLOCK = 1 << 14  # rows cast and written at a time, so that memory-mapped arrays of any size can be written


def dtype_of(name):
    return np.float16 if name.endswith('_posterior') else np.uint8 if name.endswith('_topics') else np.uint16


def running(pid):
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(int(pid), 0)  # signal 0 only asks
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def new_folder(folder):
    """
    Fill a folder, all or nothing: yields the name of a temporary sibling, which is renamed at the end. Stops with one
    line if the folder exists or cannot be written.
    """
    folder = os.path.abspath(folder)
    if os.path.lexists(folder):
        raise SystemExit(f'{folder}: is there already; delete it first, or write to another folder')
    temporary = f'{folder}.tmp-{os.getpid()}'
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        for stale in glob.glob(f'{glob.escape(folder)}.tmp-*'):  # what killed runs left behind
            if stale == temporary or not running(stale.rpartition('-')[2]):
                shutil.rmtree(stale)
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, folder)
    except OSError as error:
        raise SystemExit(f'{folder}: cannot be written ({error.strerror}); make room or choose another') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is none


def write(folder, arrays, meta, extra=None):
    """
    Write a dataset folder, all or nothing: a temporary sibling is filled, read back, then renamed.
    arrays: {'train', 'train_topics', 'val', 'val_topics': integers [rows, block_size + 1]} and, optional,
    'val_posterior': [rows, block_size + 1, n_topics]; memory maps will do. meta: at least vocab_size, block_size and
    n_topics; the rows, and sha256 and size in bytes of each file, are added. extra: other files that belong to the
    dataset, {name: the folder it is copied from}. Stops with one line if the folder exists,
    cannot be written, or would not be readable.
    """
    folder, files = os.path.abspath(folder), {}
    with new_folder(folder) as temporary:
        for name, array in arrays.items():
            path, dtype, digest = os.path.join(temporary, f'{name}.bin'), dtype_of(name), hashlib.sha256()
            if name not in NAMES or np.ndim(array) != (3 if dtype == np.float16 else 2):
                raise SystemExit(f'{folder}: cannot write {name!r} of shape {np.shape(array)}; the arrays are '
                                 f'{", ".join(NAMES)}, [rows, block_size + 1] (the posterior [.., n_topics])')
            with open(path, 'wb') as f:
                for i in range(0, len(array), BLOCK):
                    rows = np.asarray(array[i:i + BLOCK])
                    if dtype != np.float16 and (rows.dtype.kind not in 'iu' or rows.min() < 0
                                                or rows.max() > np.iinfo(dtype).max):
                        raise SystemExit(f'{folder}: {name} must hold integers from 0 to {np.iinfo(dtype).max}')
                    rows = np.ascontiguousarray(rows, dtype)
                    f.write(rows)
                    digest.update(rows)
            files[f'{name}.bin'] = {'bytes': os.path.getsize(path), 'sha256': digest.hexdigest()}
        rows = {name: len(arrays[name]) for name in ('train', 'val') if name in arrays}
        extras = {}
        for name, where in (extra or {}).items():
            shutil.copy(os.path.join(where, name), temporary)
            with open(os.path.join(temporary, name), 'rb') as f:
                sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
            extras[name] = {'bytes': os.path.getsize(f.name), 'sha256': sha256}
        with open(os.path.join(temporary, 'meta.json'), 'w') as f:
            json.dump({**meta, 'rows': rows, 'files': files} | ({'extra': extras} if extras else {}),
                      f, indent=1, allow_nan=False)
        read(temporary)  # what the reader would refuse never gets the final name


def read_meta(folder):
    """meta.json of a dataset folder as a dict. Stops with one line if it is missing or is not one."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path) as f:
            meta = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(f'{folder}: no dataset here; make it with: python data_synth.py config/X.py (or '
                         'prepare_wiki.py)') from None
    except (OSError, ValueError) as error:
        raise SystemExit(f'{path}: cannot be read as JSON ({error}); delete the folder and make it again') from None
    for key in ('vocab_size', 'block_size', 'n_topics'):
        if not isinstance(meta, dict) or type(meta.get(key)) is not int or meta[key] < 1:
            raise SystemExit(f'{path}: needs {key}, a positive integer')
    return meta


def read(folder):
    """
    SimpleNamespace(meta, folder, train, train_topics, val, val_topics, val_posterior) of a dataset folder: memory maps
    [rows, block_size + 1], val_posterior [rows, block_size + 1, n_topics] or None where there is none. Sizes and
    bounds are checked at every start, sha256 is not: that takes too long. Stops with one line that names the file
    which is missing, truncated or out of bounds.
    """
    meta, data = read_meta(folder), {}
    for name, there in meta.get('extra', {}).items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or os.path.getsize(path) != there['bytes']:
            raise SystemExit(f'{path}: missing, or not the {there["bytes"]:,} bytes of meta.json; make it again')
    width, limits = meta['block_size'] + 1, {np.uint16: meta['vocab_size'], np.uint8: meta['n_topics']}
    for name in NAMES:
        path, dtype, data[name] = os.path.join(folder, f'{name}.bin'), dtype_of(name), None
        if not os.path.isfile(path):
            if dtype == np.float16 and f'{name}.bin' not in meta.get('files', {}):
                continue
            raise SystemExit(f'{path}: missing; delete the folder and make it again')
        shape = (width, meta['n_topics']) if dtype == np.float16 else (width,)
        size, row_bytes = os.path.getsize(path), int(np.prod(shape)) * np.dtype(dtype).itemsize
        split = name.partition('_')[0]  # topics and posterior must have the rows of their tokens
        rows = meta.get('rows', {}).get(split, size // row_bytes) if name == split else len(data[split])
        if size != rows * row_bytes or rows < 1:
            whose = 'meta.json' if name == split else f'{split}.bin'
            raise SystemExit(f'{path}: has {size:,} bytes, not the {max(rows, 1):,} rows of {row_bytes:,} that '
                             f'{whose} has (block_size + 1 tokens): truncated or of another dataset; make it again')
        data[name] = np.memmap(path, dtype, 'r', shape=(rows, *shape))
        if dtype in limits and (largest := int(data[name].max())) >= limits[dtype]:
            key = 'vocab_size' if dtype == np.uint16 else 'n_topics'
            raise SystemExit(f'{path}: holds {largest}, but meta.json has {key} = {limits[dtype]}; make them agree')
    return SimpleNamespace(meta=meta, folder=folder, **data)


def is_there(folder, parameters):
    """
    True if the folder holds a dataset built with these parameters, False if there is none and one can be written. One
    built with others is refused, not reused: a line names every key that differs, with both values.
    """
    if os.path.lexists(folder):
        if not os.path.exists(os.path.join(folder, 'meta.json')):
            raise SystemExit(f'{folder}: is no dataset (no meta.json); delete it or choose another data_dir')
        meta = read_meta(folder)
        differ = [f'{key} is {meta.get(key)!r} there, {value!r} here' for key, value in parameters.items()
                  if meta.get(key) != value]
        if differ:
            raise SystemExit(f'{folder}: built with other parameters ({"; ".join(differ)}); '
                             'delete it or choose another data_dir')
        return True
    parent = os.path.dirname(os.path.abspath(folder))
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise SystemExit(f'{folder}: cannot be written ({error.strerror}); choose another data_dir') from None
    if not os.access(parent, os.W_OK):
        raise SystemExit(f'{folder}: cannot be written (no permission in {parent}); choose another data_dir')
    return False


def parameters(meta):
    """What tells a dataset from others: what it was built with, or, where that is not known, its checksums."""
    other = ('rows', 'files', 'extra', 'references', 'reference_rows', 'corpus')
    known = {k: v for k, v in meta.items() if k not in other}
    if meta.get('kind') != 'synthetic':
        known['sha256'] = [f['sha256'][:16] for f in meta.get('files', {}).values()]
    return known


def digest(array):
    """A short fingerprint of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]


def write_text(path, text):
    """Replace a small file, atomically."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(path + '.tmp', path)


def write_json(path, value):
    """Replace a JSON file, atomically; NaN is an error."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + '\n')
