"""
Runs: their folders, names and rows. The only code that makes or takes apart a name, and that writes a result.

A run is a folder, <out_dir>/<condition>/seed<k>/ (further recalibration lengths in recal_<steps>/ inside it):
config.json (its resolved settings), log.jsonl, ckpt.pt and row.json, the one row that analyze.py leaves. A run
is done when a row with its settings is there. runs.jsonl of an experiment holds all its rows: first a line
{experiment, config, compare, device, versions} with the settings that all runs share, then a row a run with the
settings in which it differs; it is published as runs.jsonl.xz.
"""
import glob
import io
import json
import lzma
import os
import re
import shutil
from contextlib import contextmanager, suppress
from os.path import abspath, basename, dirname, exists, getmtime, normpath
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from configurator import SCRIPTS, blocks

# -----------------------------------------------------------------------------
# writing: all or nothing

@contextmanager
def writing(path):
    """Stops with one line where a file or folder cannot be written: a full disk, no permission."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f'{path}: cannot be written ({e.strerror}); make room or choose another folder') from None

@contextmanager
def locked(folder, rank=0, wait=False):
    """Keeps a folder in the making to this command, by its first process: another is refused in one line, or waits."""
    if rank:
        yield
        return
    parent, name = os.path.split(abspath(folder))
    with writing(folder):
        os.makedirs(parent, exist_ok=True)
        try:
            held = FileLock(f'{parent}/.{name}.lock').acquire(blocking=wait)
        except Timeout:
            raise SystemExit(f'{folder}: another process is at work there; wait for it, or choose another') from None
    with held:
        yield

def write_bytes(path, content):
    """Replace a file, atomically."""
    with writing(path):
        os.makedirs(dirname(path) or '.', exist_ok=True)
        Path(path + '.tmp').write_bytes(content)
        os.replace(path + '.tmp', path)

def write_text(path, text):
    """Replace a text file, atomically; UTF-8."""
    write_bytes(path, text.encode('utf-8'))

def write_array(path, x):
    """Replace a .npy file, atomically."""
    file = io.BytesIO()
    np.save(file, x)
    write_bytes(path, file.getbuffer())

def plain(x, digits=17):
    """Arrays, tensors and numbers as JSON has them: nested lists, null where a number is not defined. 17 significant
    digits are all of them."""
    if isinstance(x, dict):
        return {key: plain(value, digits) for key, value in x.items()}
    if hasattr(x, 'tolist'):
        x = x.tolist()
    if isinstance(x, (list, tuple)):
        return [plain(value, digits) for value in x]
    if isinstance(x, float):
        return None if x != x else float(f'{x:.{digits}g}')
    return x

def write_json(path, value):
    """Replace a JSON file, atomically."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + '\n')

def read_json(path, advice='delete it and run its stage again'):
    """What a JSON file holds, in UTF-8; None where there is none."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise SystemExit(f'{path}: cannot be read as JSON ({e}); {advice}') from None

@contextmanager
def new_folder(folder):
    """
    Fill a folder, all or nothing: yields the name of a temporary sibling, which is renamed at the end; a kill leaves
    NAME.tmp-<pid> for you to delete. Stops with one line if the folder exists or cannot be written.
    """
    folder = abspath(folder)
    if os.path.lexists(folder):
        raise SystemExit(f'{folder}: is there already; delete it first, or write to another folder')
    temporary = f'{folder}.tmp-{os.getpid()}'
    with writing(folder):
        os.makedirs(temporary)                              # nobody else's
        try:
            yield temporary
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)    # after the rename there is none

def show(x, form):
    """A number as text, or a dash where it is undefined."""
    return '—' if x is None else format(x, form)

# -----------------------------------------------------------------------------
# names: {attention}_{order}_{positions}, made here from the columns of a row and taken apart here

# what a model can be trained with: settings of train.py; a new kind comes after those whose settings it shares
POSITIONS = {'rope': {'rope': True}, 'nope': {'rope': False}}
ARM_NAMES = ('{mha,gqa}_{shuffled,reshuffled,topic_ordered,topic_c<cycles>,pseudo,...}[_cd<percent>][_pure][_rerun]'
             f'[_{{{",".join(POSITIONS)}}}]')
OLDER = {'order_seed': None, 'repeat': 0, 'data_seed': None}         # columns that old rows lack

def order_name(columns):
    """'topic_ordered', 'topic_c4_cd20_pure', ...: the order part of a name, from the columns of a row."""
    name = columns['order']
    if name != 'shuffled':
        if columns['cycles'] > 1:
            name += f'_c{columns["cycles"]}'
        elif name == 'topic':
            name = 'topic_ordered'
        if columns['cooldown']:
            name += f'_cd{round(100 * columns["cooldown"])}'
    return name + '_pure' * columns['pure'] + '_rerun' * columns['repeat']

def arm_settings(arm, n_head):
    """
    What the name of an arm stands for: 'gqa_topic_c4_cd20' -> {n_kv_head, order, cycles, cooldown, repeat, rope} of
    train.py and `pure`, whether its training rows have one segment each. Stops with one line at any other name.
    """
    ends = '|'.join(POSITIONS)
    name = re.fullmatch(rf'(mha|gqa)_([a-z]\w*?)(?:_ordered|_c(\d+))?(?:_cd(\d+))?(_pure)?(_rerun)?(?:_({ends}))?', arm)
    if not name:
        raise SystemExit(f'arms: {arm!r} is not of the form {ARM_NAMES}')
    attention, order, cycles, cooldown, pure, rerun, positions = name.groups()
    settings = {
        'order': order,
        'cycles': int(cycles or 1),
        'cooldown': int(cooldown or 0) / 100,
        'pure': bool(pure),
        'repeat': int(bool(rerun))}
    again = arm_name(settings | {'attention': attention})
    if positions and positions != 'rope':                   # which goes without saying
        again = condition(again, positions)
    if arm != again:                                        # two names for one arm would be one folder
        raise SystemExit(f'arms: {arm!r} is {again!r} by its right name')
    if attention == 'gqa' and n_head % 2:
        raise SystemExit(f'arms: {arm!r} shares key-value heads between two queries, but n_head = {n_head} is odd')
    return settings | {
        'n_kv_head': n_head if attention == 'mha' else n_head // 2,
        **POSITIONS[positions or 'rope']}

def arm_name(columns):
    """'mha_topic_c4': the name of an arm, from the columns of a row."""
    return f'{columns["attention"]}_{order_name(columns)}'

def condition(arm, positions):
    """'mha_topic_c4_drope': the name of a condition."""
    return f'{arm}_{positions}'

def columns(config):
    """The columns that tell a run from the others of its experiment, from its config; `condition` is their name."""
    trained = config['recal_steps'] is None
    of = '' if trained else 'parent_'                       # recalibration itself is shuffled in every arm
    config = OLDER | config
    # what the model is trained with: the last whose settings the config has
    model = next(name for name in reversed(POSITIONS) if POSITIONS[name].items() <= config.items())
    found = {
        'attention': 'mha' if config['n_kv_head'] == config['n_head'] else 'gqa',
        **{key: config[of + key] for key in ('order', 'cycles', 'cooldown')},
        'pure': config.get(of + 'max_segments') == 1,
        'positions': model if trained else 'kept' if config['keep_rope'] else 'drope',
        **{key: config[key] for key in (*OLDER, 'seed', 'recal_steps')}}
    return {'condition': condition(arm_name(found), found['positions']), **found}

def run_folder(out_dir, config):
    """Where a trained run goes: <out_dir>/<condition>/seed<k>."""
    return f'{out_dir}/{columns(config)["condition"]}/seed{config["seed"]}'

def recal_folder(parent, keep_rope, further=None):
    """
    Where a recalibration of the run folder `parent` goes: .../<arm>_rope/seed<k> gets .../<arm>_drope/seed<k>
    (or _kept), another layout such as out/mine gets out/mine_drope. further: steps of a length that is not the
    main one.
    """
    parent = normpath(parent)
    kind = 'kept' if keep_rope else 'drope'
    arm, seed = os.path.split(parent)
    if arm.endswith('_rope'):
        folder = f'{arm.removesuffix("rope")}{kind}/{seed}'
    else:
        folder = f'{parent}_{kind}'
    return folder if further is None else f'{folder}/recal_{further}'

def is_main(folder):
    """Whether a run is trained, or recalibrated for the main length: not in a further recal_<steps> folder."""
    return not Path(folder).name.startswith('recal_')

# -----------------------------------------------------------------------------
# configs

# where a run was made and how fast
IDENTITY_FREE = {'data_dir', 'out_dir', 'run', 'parent', 'device', 'compile', 'grad_accum'}

def defaults():
    """{key: default} of every script's config block: what a run was made with that is older than a key."""
    return {key: setting.default for key, setting in blocks(SCRIPTS).items()}

def differences(config, there):
    """
    The keys, sorted, in which two configs describe different runs; a key that one lacks has its default there.
    """
    ours, theirs = (defaults() | plain(settings) for settings in (config, there))
    keys = (config.keys() | there.keys()) - IDENTITY_FREE
    if None in (config.get('data_seed'), there.get('data_seed')):              # older, or of a dataset without a seed
        keys -= {'data_seed'}
    return sorted(key for key in keys if ours.get(key) != theirs.get(key))

def read_config(folder):
    """config.json of a run folder as a dict."""
    path = f'{folder}/config.json'
    config = read_json(path, 'delete the folder and train again')
    if config is None:
        raise SystemExit(f'{folder or "--run=FOLDER"}: no run here (config.json is missing); train.py makes one')
    if not isinstance(config, dict) or not {'recal_steps', 'data_dir', 'seed', 'n_layer'} <= config.keys():
        raise SystemExit(f'{path}: not of one of our runs; train.py makes one')
    return config | {'data_dir': find_data(folder, config['data_dir'])}

def find_data(folder, data_dir):
    """The dataset that a run's config names: as seen from here or else from the nearest folder above the run."""
    if exists(data_dir):
        return data_dir
    for above in Path(folder).absolute().parents:
        if (above / data_dir).exists():
            return os.path.relpath(above / data_dir)
    return data_dir

def open_run(folder, config):
    """Write config.json into a new run folder, or check that the run already there has the same settings."""
    path = f'{folder}/config.json'
    if not exists(path):
        return write_json(path, config)
    there = read_config(folder)
    for key in differences(config, there):
        raise SystemExit(f'{folder}: holds a run with other settings ({key} = {there.get(key)!r}, here '
                         f'{config.get(key)!r}); delete it or choose another --out_dir')

def append_log(folder, record):
    """Add a record to log.jsonl of a run folder."""
    path = f'{folder}/log.jsonl'
    with writing(path), open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(record) + '\n')

def read_log(folder):
    """The lines of log.jsonl of a run folder that record a step, as dicts; [] where there are none yet."""
    records = []
    with suppress(FileNotFoundError), open(f'{folder}/log.jsonl', encoding='utf-8') as f:
        for line in f:
            with suppress(ValueError):                      # a kill may have cut the last line
                records.append(json.loads(line))
    return [r for r in records if 'step' in r]

def orderedness(records, key):
    """
    Mutual information of the step (bins of the log) and the topic, over the entropy of the topics: 1 if the step tells
    the topic; for shuffled rows about (K-1)/(2 rows a bin) / H, near 0. key: 'topics', the dominant ones of rows, or
    'tokens', those of all their tokens. None without topics.
    """
    from scipy.stats import entropy                         # only here: they take a second
    from sklearn.metrics import mutual_info_score
    counts = [r[key] for r in records if sum(r.get(key, ()))]                  # [bins][K]
    H = entropy(np.sum(counts, 0)) if counts else 0
    return mutual_info_score(None, None, contingency=np.array(counts)) / H if H else None

def curve(records):
    """The log in about a hundred points, every evaluation among them; topics are added up since the point before."""
    stride = 1 + len(records) // 100
    kept, topics = [], 0
    for i, record in enumerate(records):
        topics = topics + np.array(record['topics'])
        if i % stride == 0 or record['val_loss'] is not None:
            kept.append(record | {'topics': topics})
            topics = 0
    found = {}
    for key in ('step', 'loss', 'val_loss', 'lr', 'topics'):
        found[key] = [record[key] for record in kept]
    return found

# -----------------------------------------------------------------------------
# rows

def read_row(folder):
    """row.json of a run folder; None where the run is not done."""
    row = read_json(f'{folder}/row.json')
    if row is None:
        return None
    if not isinstance(row, dict) or 'config' not in row:
        raise SystemExit(f'{folder}/row.json: not a row of ours; delete it and run analyze.py again')
    return OLDER | row

def write_row(folder, row):
    """Leave the row of a run, and return it: nine significant digits of what was measured, more are rounding's."""
    row = plain(row, 9) | {'config': row['config']}
    write_json(f'{folder}/row.json', row)
    return row

def key(row):
    """What finds a row in its experiment, and sorts them as tables show them: shuffled first, RoPE before DroPE."""
    return (row['attention'] != 'mha', row['pure'], row['repeat'],
            row['order'] != 'shuffled', row['order'], row['cycles'], row['cooldown'],
            [*POSITIONS, 'kept', 'drope'].index(row['positions']), row['recal_steps'] or 0, row['seed'])

def read_rows(folder):
    """
    (header, rows) of an experiment folder: from its runs.jsonl, or runs.jsonl.xz, which is published, with the
    whole config in every row. (None, []) where there is no such file.
    """
    path, opener = f'{folder}/runs.jsonl', open
    if not exists(path):
        path, opener = path + '.xz', lzma.open
    try:
        with opener(path, 'rt', encoding='utf-8') as f:
            header, *rows = map(json.loads, f)
    except FileNotFoundError:
        if exists(f'{folder}/runs.jsonl.gz'):
            raise SystemExit(f'{folder}/runs.jsonl.gz: of an older version; unpack it with gunzip') from None
        return None, []
    except (OSError, ValueError, EOFError, lzma.LZMAError) as e:
        raise SystemExit(f'{path}: cannot be read as lines of JSON ({e}); restore it, or delete it: the experiment '
                         'writes it again, as far as its runs are there') from None
    rows = [OLDER | row | {'config': header['config'] | row['config']} for row in rows]
    return header, rows

def dump_rows(header, rows):
    """The lines of runs.jsonl: a key of the config that all rows agree on stands in the header alone."""
    configs = [row['config'] for row in rows]
    shared = {k: v for k, v in configs[0].items() if all(k in c and c[k] == v for c in configs)}
    lines = [header | {'config': shared}]
    for row in rows:
        lines.append(row | {'config': {k: v for k, v in row['config'].items() if k not in shared}})
    return ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines)

def gather(out_dir, folders=None, compare=None, place=''):
    """
    Write runs.jsonl of an experiment from the row.json of its run folders (none: all below out_dir), under a lock,
    and runs.jsonl.xz into the folder `place`; returns (header, rows). compare: {'base', 'placebo', 'primary'} of the
    experiment, for report.py; none: as it was.
    """
    with FileLock(f'{out_dir}/runs.jsonl.lock'):
        rows = sorted(filter(None, map(read_row, folders or row_folders(out_dir))), key=key)
        before, _ = read_rows(out_dir)
        header = make_header(out_dir, rows, compare or (before and before['compare']))
        text = dump_rows(header, rows)
        write_text(f'{out_dir}/runs.jsonl', text)
        if place:                                           # a quarter of the bytes
            write_bytes(f'{place}/runs.jsonl.xz', lzma.compress(text.encode()))
            Path(f'{place}/runs.jsonl').unlink(missing_ok=True)     # of an older version
    return header, rows

def make_header(out_dir, rows, compare):
    """The first line of runs.jsonl; compare: None is the block's."""
    return {
        'experiment': basename(abspath(out_dir)),
        'compare': compare or {k: defaults()[k] for k in ('base', 'placebo', 'primary')},
        'device': ' and '.join(dict.fromkeys(row['device'] for row in rows)),
        'versions': rows[0]['versions']}

def row_folders(out_dir, name='row.json'):
    """The run folders below out_dir that have a row, or another file."""
    return [dirname(path) for path in glob.glob(f'{glob.escape(out_dir)}/**/{name}', recursive=True)]

def row_of_log(folder):
    """What the log of a run tells before anything is measured, as a row."""
    config, records = read_config(folder), read_log(folder)
    losses = [record['val_loss'] for record in records if record['val_loss'] is not None]
    return columns(config) | {
        'main': is_main(folder), 'measures_version': 1, 'val_loss': losses[-1], 'references': {},
        'curve': curve(records), 'device': 'not measured', 'versions': {'torch': '—'}, 'config': config}

def open_rows(folder):
    """(header, rows) of an experiment folder, gathered anew where a run has a newer row; one line if there is none."""
    path = f'{folder}/runs.jsonl'
    gathered = getmtime(path) if exists(path) else 0
    if any(getmtime(f'{run}/row.json') > gathered for run in row_folders(folder)):
        return gather(folder)
    header, rows = read_rows(folder)
    if not rows:                                            # trained, not yet analysed: that has losses at least
        rows = [row_of_log(run) for run in row_folders(folder, 'ckpt.pt')]     # a checkpoint comes after a loss
        if not rows:
            raise SystemExit(f'{folder}: holds no row.json and no runs.jsonl; give a folder of runs such as out/demo')
        header = make_header(folder, rows, None)
    return header, rows

# -----------------------------------------------------------------------------
# results/

def publish(out_dir, place):
    """Copy report, figures and examples to the folder `place`, beside the rows, which `gather` has put there; what else
    is there stays."""
    for pattern in ('*.json', '*.md', 'figures/*.png'):
        for name in glob.glob(pattern, root_dir=out_dir):
            write_bytes(f'{place}/{name}', Path(f'{out_dir}/{name}').read_bytes())
    print(f'published: {place}')
