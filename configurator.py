"""
Strict overrides for plain scripts, after nanoGPT's configurator.

Each script begins with a config block: top-level assignments, before the first function. Then
    python train.py config/mha_topic.py --max_iters=100
reads the block, runs the config file in a scratch namespace, and applies the flags: files before flags,
whatever their order on the line. A file may hold keys of any script (one file describes an experiment);
a flag must belong to this script. A comment that ends with an interval, [1, inf), says what a number may be.
Unknown keys, wrong types and numbers out of range stop with one line. `-h` prints the docstring and the block.
"""
import ast
import difflib
import functools
import os
import re
import sys
import types
import typing
from contextlib import suppress
from os.path import abspath, basename, dirname, expanduser, join

_here = dirname(abspath(__file__))
SCRIPTS = ('prepare_wiki.py', 'data_synth.py', 'train.py', 'drope.py', 'analyze.py', 'plot.py', 'view.py',
           'run_experiment.py')                             # of a key that two define an experiment has the later's

# -----------------------------------------------------------------------------
# the config block of a script

class Setting(typing.NamedTuple):
    default: object         # a tuple's asks for a tuple; where it is None the value may be
    kind: type              # that a value must have, or every element of a tuple
    range: str              # of a number: '[0, 1)'; '' is any
    comment: str

def source(path):
    """The text of a script beside this one, or of any file, with or without a byte order mark."""
    with open(join(_here, path), encoding='utf-8-sig') as f:
        return f.read()

@functools.cache
def block(script):
    """
    {key: Setting} of a script, read from its source without importing it: its first top-level assignments. The type of
    a default is the type a value must have; a key that may also be None is annotated: `n_kv_head: int = None`.
    """
    keys, scratch = {}, {}
    whole = source(script)
    lines = whole.splitlines()
    for node in ast.parse(whole).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        text = ast.unparse(node)
        setting = re.match(r'([a-z][a-z0-9_]*)(?:: (\w+))? = ', text)
        if not setting:
            continue
        key, annotation = setting.groups()
        exec(text, scratch)
        value = scratch[key]
        comment = lines[node.lineno - 1].partition('# ')[2]
        kind = eval(annotation) if annotation else type(value)
        if kind is tuple:
            kind = type(value[0])
        interval = re.search(r'[\[(]-?[\d.]+, (?:[\d.e*]+|inf)[\])]$', comment) or ['']
        keys[key] = Setting(value, kind, interval[0], comment)
    return keys

def blocks(scripts):
    """The blocks of several scripts as one; of a key that two have, the later's."""
    keys = {}
    for script in scripts:
        keys |= block(script)
    return keys

def within(x, interval):
    """Whether a number lies in an interval, '[0, 2**63)'; nan lies in none."""
    low, high = interval[1:-1].split(', ')
    above = '<=' if interval[0] == '[' else '<'
    below = '<=' if interval[-1] == ']' else '<'
    return eval(f'{low} {above} x {below} {high}', {'x': x, 'inf': float('inf')})

def check(key, value, setting, where):
    """The value as the setting wants it, or one line that says what is wrong with it; ~ is the home folder."""
    if value is setting.default is None:
        return None
    if isinstance(setting.default, tuple):                  # a scalar is a tuple of one; names may be 'a,b'
        if isinstance(value, str):
            value = value.split(',')
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not values:
            raise SystemExit(f'{where}: {key} is empty; expected at least one value')
        element = setting._replace(default=setting.default[0])
        return tuple(check(key, v, element, where) for v in values)
    kind = setting.kind
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise SystemExit(f'{where}: {key} = {value!r} is a {type(value).__name__}; '
                         f'expected {kind.__name__}{" or none" if setting.default is None else ""}')
    if setting.range and not within(value, setting.range):
        raise SystemExit(f'{where}: {key} = {value!r} is not in {setting.range}')
    return expanduser(value) if kind is str else value

def setting_of(key, known, where):
    """The setting of a key, or one line that names the nearest."""
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise SystemExit(f'{where}: unknown key {key!r}{hint}')

# -----------------------------------------------------------------------------
# overrides

def read_file(path):
    """The keys that a config file sets, each known to some script, as {key: value}."""
    scratch = {}
    try:
        exec(compile(source(abspath(path)), path, 'exec'), scratch)
    except Exception as e:                                  # a missing file too
        raise SystemExit(f'{path}: {type(e).__name__}: {e}; a config is a Python file such as config/run1.py') from None
    # a data script of one's own has keys of its own
    known = blocks((scratch.get('data_script') or SCRIPTS[0], *SCRIPTS))
    keys = {}
    for key, value in scratch.items():
        if key.startswith('_') or callable(value) or isinstance(value, types.ModuleType):
            continue                                        # what a config imports or defines to derive its values
        keys[key] = check(key, value, setting_of(key, known, path), path)
    return keys

def parse(text):
    """A flag's value as Python would read it; true, false and none in lower case too; else the text itself."""
    if text in ('true', 'false', 'none'):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

def configure(script, argv=None, positional=False, stages=()):
    """The resolved config of a script, as a namespace.

    script: its __file__. argv: config files and --key=value flags (default: the command line).
    positional: it takes a folder too, a plain argument that is not a .py file: cfg.paths (plot.py's).
    stages: other scripts whose keys this one takes as well (run_experiment.py passes them on).
    cfg.overrides holds what files and flags have set, cfg.files the names of the files.
    """
    name = basename(script)
    keys = blocks((*stages, name))
    argv = sys.argv[1:] if argv is None else argv
    if '-h' in argv or '--help' in argv:
        print(ast.get_docstring(ast.parse(source(name))) or name, end='\n\n')
        for key, setting in keys.items():                   # its own last: in sight
            print(f'--{key}={setting.default!r}'.ljust(39), setting.comment)
        raise SystemExit

    flags = [arg for arg in argv if arg.startswith('--')]
    files = [arg for arg in argv if arg.endswith('.py') and arg not in flags]
    paths = [expanduser(arg) for arg in argv if arg not in files + flags]
    if len(paths) != positional:                            # True is one
        raise SystemExit(f'{name} takes config files (.py), --key=value flags and {"one" if positional else "no"} '
                         f'experiment folder; here {paths}')

    overrides = {}
    for path in files:
        overrides |= read_file(path)
    for flag in flags:
        key, eq, text = flag[2:].partition('=')
        where = f'{name} {flag}'
        setting = setting_of(key, keys, where)
        if not eq:
            raise SystemExit(f'{where}: write {flag}=value')
        # --run=123 names a folder, not a number
        overrides[key] = check(key, text if type(setting.default) is str else parse(text), setting, where)
    # a file may have set keys of other scripts too
    values = {key: overrides.get(key, setting.default) for key, setting in keys.items()}
    return types.SimpleNamespace(**values, overrides=overrides, paths=paths, files=files)

# -----------------------------------------------------------------------------
# a script as a person types it

class Patient:
    """A stream to print to that stops nothing: not where its reader has left (| head), nor where its disk is full,
    nor where it is closed or cannot show a character."""
    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')
        with suppress(AttributeError):                      # a notebook's shows every character
            self.stream.reconfigure(errors='replace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

def be_patient():
    """What this process prints stops nothing."""
    sys.stdout = Patient(sys.stdout)
    sys.stderr = Patient(sys.stderr)

def command(main, script, **options):
    """Run main with the config of the command line; whatever the environment does is told in one line."""
    be_patient()
    try:
        main(configure(script, **options))
    except OSError as e:
        raise SystemExit(f'{basename(script)}: {e.filename or "a file"}: {e.strerror or e}') from None
    except KeyboardInterrupt:
        raise SystemExit(f'{basename(script)}: stopped; the same command goes on') from None
