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
import functools
import hashlib
import shutil
from os.path import exists, getsize, isfile, lexists
from types import SimpleNamespace

import numpy as np

from runs import new_folder, read_json, write_json

DTYPES = {'train': np.uint16, 'train_topics': np.uint8, 'val': np.uint16, 'val_topics': np.uint8,
          'val_posterior': np.float16}                      # in the order of reading; the last is optional
NEEDED = ('vocab_size', 'block_size', 'n_topics')           # of meta.json
RESULTS = ('rows', 'files', 'extra', 'references', 'reference_rows', 'corpus')     # what is no parameter in it
BLOCK = 1 << 14             # rows cast and written at a time, so that memory-mapped arrays of any size can be written


def file_entry(path):
    """What meta.json says of a file: {'bytes', 'sha256'}."""
    with open(path, 'rb') as f:
        sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
    return {'bytes': getsize(path), 'sha256': sha256}


def write_array(path, array, dtype):
    """Write an array, or an iterator of blocks of its rows; returns its rows. Stops with one line where it holds what
    its dtype cannot."""
    if not hasattr(array, '__next__'):
        array = np.array_split(array, len(array) // BLOCK + 1)
    n_rows = 0
    with open(path, 'wb') as f:
        for block in array:
            rows = np.asarray(block)
            n_rows += len(rows)
            if dtype != np.float16:
                largest = np.iinfo(dtype).max
                if rows.dtype.kind not in 'iu' or rows.min(initial=0) < 0 or rows.max(initial=0) > largest:
                    raise SystemExit(f'{path}: must hold integers from 0 to {largest}')
            f.write(np.ascontiguousarray(rows, dtype))
    return n_rows


def write(folder, arrays, meta, extra=None):
    """
    Write a dataset folder, all or nothing: a temporary sibling is filled, read back, then renamed.
    arrays: {'train', 'train_topics', 'val', 'val_topics': integers [rows, block_size + 1]} and, optional,
    'val_posterior': [rows, block_size + 1, n_topics]; memory maps will do, and iterators of blocks of rows. meta: at
    least vocab_size, block_size and n_topics; the rows, and sha256 and size in bytes of each file, are added. extra:
    other files that belong to the dataset, {name: the folder it is copied from}. Stops with one line if the folder
    exists, cannot be written, or would not be readable.
    """
    with new_folder(folder) as temporary:
        files, rows = {}, {}
        for name, array in arrays.items():
            ndim = 3 if name == 'val_posterior' else 2
            if name not in DTYPES or not hasattr(array, '__next__') and np.ndim(array) != ndim:
                raise SystemExit(f'{folder}: cannot write {name!r} of shape {np.shape(array)}; the arrays are '
                                 f'{", ".join(DTYPES)}, [rows, block_size + 1] (the posterior [.., n_topics])')
            path = f'{temporary}/{name}.bin'
            n_rows = write_array(path, array, DTYPES[name])
            if name in ('train', 'val'):
                rows[name] = n_rows
            files[f'{name}.bin'] = file_entry(path)
        meta = {**meta, 'rows': rows, 'files': files}
        if extra:
            meta['extra'] = {name: file_entry(shutil.copy(f'{where}/{name}', temporary))
                             for name, where in extra.items()}
        write_json(f'{temporary}/meta.json', meta)
        read(temporary)                                     # what the reader would refuse never gets the final name


def largest_in(path, dtype):
    """The largest number of a file, read in pieces: of a memory map all that was read counts as memory."""
    with open(path, 'rb') as f:
        return max(np.frombuffer(piece, dtype).max() for piece in iter(functools.partial(f.read, 1 << 24), b''))


def read_meta(folder):
    """meta.json of a dataset folder as a dict. Stops with one line if it is missing or is not one."""
    path = f'{folder}/meta.json'
    if not exists(path):
        raise SystemExit(f'{folder}: no dataset here; make it with: python data_synth.py config/X.py (or '
                         'prepare_wiki.py)')
    meta = read_json(path, 'delete the folder and make it again')
    for key in NEEDED:
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
    meta = read_meta(folder)
    files = meta.get('files', {}) | meta.get('extra', {})
    for name, entry in files.items():
        path = f'{folder}/{name}'
        if not isfile(path) or getsize(path) != entry['bytes']:
            raise SystemExit(f'{path}: missing, or not the {entry["bytes"]:,} bytes of meta.json; make it again')

    data = {'val_posterior': None}
    for name, dtype in DTYPES.items():
        path = f'{folder}/{name}.bin'
        split, _, labels = name.partition('_')              # 'val', 'topics'; tokens have no labels
        shape = [len(data[split]) if labels else -1, meta['block_size'] + 1]   # labels have the rows of their tokens
        if labels == 'posterior':
            shape.append(meta['n_topics'])
        if not isfile(path):
            if labels == 'posterior':
                continue
            raise SystemExit(f'{path}: missing; delete the folder and make it again')
        try:
            data[name] = np.memmap(path, dtype, 'r').reshape(shape)
        except ValueError:
            raise SystemExit(f'{path}: has {getsize(path):,} bytes, not whole rows of {shape[1:]} {dtype.__name__}, '
                             f'as many as {split}.bin has (block_size + 1 tokens); make it again') from None
        if labels != 'posterior':
            key = 'n_topics' if labels else 'vocab_size'
            largest = largest_in(path, dtype)
            if largest >= meta[key]:
                raise SystemExit(f'{path}: holds {largest}, but meta.json has {key} = {meta[key]}; make them agree')
    return SimpleNamespace(meta=meta, folder=folder, **data)


def is_there(folder, parameters):
    """
    Whether the folder holds a dataset built with these parameters; says so. One built with others is refused, not
    reused: a line names every key that differs, with both values.
    """
    if not lexists(folder):
        return False
    if not exists(f'{folder}/meta.json'):
        raise SystemExit(f'{folder}: is no dataset (no meta.json); delete it or choose another data_dir')
    meta = read_meta(folder)
    differ = [f'{key} is {meta.get(key)!r} there, {value!r} here' for key, value in parameters.items()
              if meta.get(key) != value]
    if differ:
        raise SystemExit(f'{folder}: built with other parameters ({"; ".join(differ)}); '
                         'delete it or choose another data_dir')
    print(f'{folder} is there, with these parameters')
    return True


def parameters(meta):
    """What tells a dataset from others: what it was built with, or, where that is not known, its checksums."""
    known = {key: value for key, value in meta.items() if key not in RESULTS}
    if meta.get('kind') != 'synthetic':
        known['sha256'] = [entry['sha256'][:16] for entry in meta.get('files', {}).values()]
    return known


def digest(array):
    """A short fingerprint of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]
