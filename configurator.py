"""
Strict overrides for plain scripts, after nanoGPT's configurator.

Each script begins with a config block: top-level assignments, before the first function. Then
    python train.py config/mha_topic.py --max_iters=100
reads the block, runs the config file in a scratch namespace, and applies the flags: files before flags,
whatever their order on the line. A file may hold keys of any script (one file describes an experiment);
a flag must belong to this script. Unknown keys and wrong types stop with one line. `-h` prints the block.
"""
import ast
import difflib
import functools
import os
import sys
import types
import typing

_here = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = ('prepare_wiki.py', 'data_synth.py', 'train.py', 'drope.py', 'analyze.py', 'tensor_lens.py', 'plot.py',
           'run_experiment.py')                             # of a key that two define an experiment has the later's

# -----------------------------------------------------------------------------
# the config block of a script

@functools.cache
def block(script):
    """{key: (default, type)} of a script, read from its source without importing it. The type of a default
    is the type a value must have; a key that may also be None is annotated: `n_kv_head: int = None`."""
    keys, scratch = {}, {}
    for node in ast.parse(open(os.path.join(_here, script)).read()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith('_'):
            exec(compile(ast.Module([node], []), script, 'exec'), scratch)
            value, kind = scratch[target.id], type(scratch[target.id])
            if kind is tuple:
                kind = tuple[type(value[0])]                # all of a tuple's elements are of the first one's type
            if isinstance(node, ast.AnnAssign):
                kind = typing.Optional[eval(compile(ast.Expression(node.annotation), script, 'eval'), scratch)]
            keys[target.id] = (value, kind)
    return keys

def check(key, value, kind, where):
    """The value as `kind`, or one line that says what is wrong with it."""
    optional = typing.get_origin(kind) is typing.Union
    base = typing.get_args(kind)[0] if optional else kind
    if value is None and optional:
        return None
    if base is float and type(value) is int:
        return float(value)
    if typing.get_origin(base) is tuple:                    # a scalar is a tuple of one; names may be 'a,b'
        value = value.split(',') if isinstance(value, str) else value
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not values:
            raise SystemExit(f'{where}: {key} is empty; expected at least one value')
        return tuple(check(key, v, typing.get_args(base)[0], where) for v in values)
    if type(value) is not base:
        raise SystemExit(f'{where}: {key} = {value!r} is a {type(value).__name__}; '
                         f'expected {base.__name__}{" or none" if optional else ""}')
    return value

def unknown(key, known, where):
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise SystemExit(f'{where}: unknown key {key!r}' + (f'; did you mean {near[0]!r}?' if near else ''))

# -----------------------------------------------------------------------------
# overrides

def read_file(path):
    """The keys that a config file sets, each known to some script, as {key: value}."""
    try:
        source = open(path, encoding='utf-8').read()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, 'strerror', None) or 'not UTF-8 text'
        raise SystemExit(f'{path}: {reason}; a config is a Python file such as config/run1.py') from None
    scratch = {}
    try:
        exec(compile(source, path, 'exec'), scratch)
    except SyntaxError as e:
        raise SystemExit(f'{path}, line {e.lineno}: {e.msg}') from None
    except Exception as e:
        raise SystemExit(f'{path}: {type(e).__name__}: {e}') from None
    known = {k: kind for s in SCRIPTS for k, (_, kind) in block(s).items()}
    keys = {}
    for key, value in scratch.items():
        if key.startswith('_') or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        if key not in known:
            unknown(key, known, path)
        keys[key] = check(key, value, known[key], path)
    return keys

def parse(text):
    """A flag's value as Python would read it; true, false and none in lower case too; else the text itself."""
    text = {'true': 'True', 'false': 'False', 'none': 'None'}.get(text, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

def configure(script, argv=None, positional=False, stages=()):
    """The resolved config of a script, as a namespace.

    script: its __file__. argv: config files and --key=value flags (default: the command line).
    positional: plain arguments that are not .py files are kept in cfg.paths (plot.py's folders).
    stages: other scripts whose keys this one takes as well (run_experiment.py passes them on).
    cfg.overrides holds what files and flags have set, cfg.files the names of the files.
    """
    name = os.path.basename(script)
    keys = {}
    for s in (*stages, name):
        keys.update(block(s))
    argv = sys.argv[1:] if argv is None else argv
    if '-h' in argv or '--help' in argv:
        for key, (value, _) in keys.items():
            print(f'--{key}={value!r}'.ljust(40) + comment(key, (name, *stages)))
        raise SystemExit(0)
    files, flags, paths = [], [], []
    for arg in argv:
        if arg.startswith('--'):
            flags.append(arg)
        elif arg.endswith('.py'):
            files.append(arg)
        elif positional:
            paths.append(arg)
        else:
            raise SystemExit(f'{name}: {arg!r} is neither a config file (.py) nor a --key=value flag')
    overrides = {}
    for path in files:
        overrides.update(read_file(path))
    for flag in flags:
        key, eq, text = flag[2:].partition('=')
        where = f'{name} {flag}'
        if key not in keys:
            unknown(key, keys, where)
        if not eq:
            raise SystemExit(f'{where}: write --{key}={"True" if keys[key][1] is bool else "value"}')
        value = parse(text)
        if keys[key][1] is str or (keys[key][1] == typing.Optional[str] and value is not None):
            value = text                                  # --run=123 names a folder, not a number
        overrides[key] = check(key, value, keys[key][1], where)
    cfg = types.SimpleNamespace(**{k: overrides.get(k, value) for k, (value, _) in keys.items()})
    cfg.overrides, cfg.paths, cfg.files = overrides, paths, files
    return cfg

def at_least(cfg, **least):
    """Stops with one line at the first of these settings that is below its least value; None is none."""
    for key, value in least.items():
        if getattr(cfg, key) is not None and getattr(cfg, key) < value:
            raise SystemExit(f'{key} = {getattr(cfg, key)}: must be at least {value}')

def comment(key, scripts):
    """The trailing comment of a key in the first of these scripts that has it."""
    for script in scripts:
        for line in open(os.path.join(_here, script)):
            if line.split(':')[0].split('=')[0].strip() == key and '#' in line and not line[0].isspace():
                return '# ' + line.split('#', 1)[1].strip()
    return ''
