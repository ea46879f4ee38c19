"""Order, resume, processes and DroPE: the real scripts, tiny, on datasets made here."""
import contextlib
import functools
import io
import itertools
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import shards
from bench import plain_step
from model import build
from optim import optimizers
from report import value
from runs import read_json, read_log, row_of_log
from train import ORDERS, compiled, count_topics, lr_scale, row_order, training_step

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--head_dim=8', '--mlp_hidden=24', '--batch_size=8',
        '--adam_lr=0.003', '--log_interval=1', '--device=cpu']
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
torch.set_num_threads(1)                                    # small tensors: more threads only wait

def run(script, *args, cwd='.'):
    """A script as a person would run it, on one CPU thread, in this process, which spares its start; what its children
    print is not in what it returns."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    no_gpu, env = mock.patch('torch.cuda.is_available', lambda: False), mock.patch.dict(os.environ, ENV)
    argv, told = mock.patch('sys.argv', [script, *args]), contextlib.redirect_stderr(err)
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), told, no_gpu, env, argv:
        try:
            runpy.run_path(os.path.join(HERE, script), run_name='__main__')
        except SystemExit as stop:
            status = int(bool(stop.code))
            err.write(f'{stop.code}\n' if status else '')
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

def command(script, *args, n=1):
    """The command line of a script, in n processes."""
    torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--standalone'] if n > 1 else []
    return [sys.executable, *torchrun, os.path.join(HERE, script), *args]

def spawn(line, cwd='.', env={}):
    """A command line, to its end."""
    return subprocess.run(line, capture_output=True, text=True, env=ENV | env, cwd=cwd)

def two_runs(data_dir, parent, *flags):
    """The folders of a run with RoPE and of one without, by the real stages; then every weight is drawn at random,
    norm gains too, and large enough to matter."""
    dropped = parent.replace('rope', 'drope')
    succeeds(run('train.py', *TINY, *flags, f'--data_dir={data_dir}', f'--run={parent}', '--max_iters=4'))
    succeeds(run('drope.py', f'--run={parent}', '--recal_iters=2'))
    for folder in (parent, dropped):
        ckpt, g = torch.load(f'{folder}/ckpt.pt', weights_only=True), torch.Generator().manual_seed(len(folder))
        for w in ckpt['model'].values():
            w.normal_(w.ndim == 1, 0.3, generator=g)
        torch.save(ckpt, f'{folder}/ckpt.pt')
    return parent, dropped

def succeeds(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done

def refuses(done, *words):
    """It stops with one line that has these words."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and 'Traceback' not in done.stderr, done.stderr
    assert len(lines) == 1 and all(w in lines[0] for w in words), done.stderr

@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """100 rows of 33 tokens over 20 symbols and 3 topics, of unequal sizes; no structure is needed here."""
    rng = np.random.default_rng(0)
    first, then = rng.choice(3, (2, 100, 1), p=(0.5, 0.3, 0.2))
    topics = np.where(np.arange(33) < rng.integers(8, 25, (100, 1)), first, then)
    tokens = (rng.integers(0, 20, (100, 33)) + topics) % 20
    folder = str(tmp_path_factory.mktemp('data') / 'tiny')
    shards.write(folder, dict(train=tokens, train_topics=topics, val=tokens[:16], val_topics=topics[:16]),
                 dict(vocab_size=20, block_size=32, n_topics=3))
    return folder

def weights(folder):
    return torch.load(os.path.join(folder, 'ckpt.pt'), weights_only=True)['model']

def losses(folder):
    return np.array([[r['loss'] or 0, r['val_loss'] or 0] for r in read_log(folder)])

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# -----------------------------------------------------------------------------
# order

LABELS = np.random.default_rng(0).choice(4, 100, p=(0.4, 0.3, 0.2, 0.1))

@pytest.mark.parametrize('n_rows', (100, 300, 250, 64))            # whole epochs, and fractions of one
@pytest.mark.parametrize('cooldown', (0, 40))
def test_arms_read_the_same_rows_in_every_epoch(n_rows, cooldown):
    reference = row_order(LABELS, n_rows, seed=3)
    assert sorted(reference[:100]) == list(range(100))[:n_rows] or n_rows < 100
    for order, cycles in itertools.product(ORDERS, (1, 4)):
        rows = row_order(LABELS, n_rows, order, cycles, cooldown, seed=3)
        edges = sorted({*range(0, n_rows, 100), n_rows - cooldown, n_rows})
        for a, b in zip(edges, edges[1:]):
            assert sorted(rows[a:b]) == sorted(reference[a:b])
        assert (rows[n_rows - cooldown:] == reference[n_rows - cooldown:]).all()
        assert (rows == reference).all() == (order == 'shuffled')
    assert sorted(row_order(LABELS, n_rows, seed=4)) != sorted(reference) or n_rows % 100 == 0

def n_blocks(rows):
    return 1 + int((np.diff(LABELS[rows]) != 0).sum())

def test_reshuffled_differs_in_the_order_alone(dataset, tmp_path):
    """The same weights to begin with, other batches, and the recalibration rows of all arms."""
    for order in ('shuffled', 'reshuffled'):
        succeeds(run('train.py', *TINY, f'--data_dir={dataset}', '--max_iters=9', '--muon_lr=0', '--adam_lr=0',
                     f'--order={order}', f'--run={tmp_path}/{order}'))
        succeeds(run('drope.py', f'--run={tmp_path}/{order}', '--recal_iters=3'))
    assert same(weights(f'{tmp_path}/shuffled'), weights(f'{tmp_path}/reshuffled'))
    rows_of = lambda folder: torch.load(f'{tmp_path}/{folder}/ckpt.pt', weights_only=True)['rows']
    assert rows_of('shuffled') != rows_of('reshuffled') and rows_of('shuffled_drope') == rows_of('reshuffled_drope')
    others = [row_order(LABELS, 200, 'reshuffled', seed=1, order_seed=k) for k in (None, 1, 2)]
    assert (others[0] == others[1]).all() and (others[1] != others[2]).any()
    assert (others[0][:100] != others[0][100:]).any()       # another shuffle in every epoch

def test_topic_order_is_blocks():
    rows, reference = row_order(LABELS, 200, 'topic', seed=1), row_order(LABELS, 100, seed=1)
    assert LABELS[rows[0]] == 1                                    # the order of topics is rotated by seed
    assert n_blocks(rows[:100]) == n_blocks(rows[100:]) == 4
    assert n_blocks(row_order(LABELS, 100, 'topic', 5, seed=1)) == 5 * 4
    for k in range(4):                                             # stable: the shuffle survives inside a block
        assert (rows[:100][LABELS[rows[:100]] == k] == reference[LABELS[reference] == k]).all()
    assert n_blocks(row_order(LABELS, 100, 'pseudo', seed=1)) > 40           # blocks of a label that means nothing

def test_dominant_topic_and_learning_rate():
    counts = count_topics(np.array([[0, 1, 1], [2, 2, 1], [0, 1, 2]]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 1, 2], [1, 1, 1]] and counts.argmax(1).tolist() == [1, 2, 0]
    short, long = ({'max_iters': n, 'warmup_iters': 500} for n in (1000, 10_000))
    lr = [lr_scale(s, short) for s in range(1000)]
    assert lr[0] == 1 / 50 and lr[49] == 1 and max(lr) == 1 and 0 < lr[-1] < 1e-5     # warm-up is at most a twentieth
    assert lr_scale(499, long) == 1 and lr_scale(5250, long) == pytest.approx(0.5)

# -----------------------------------------------------------------------------
# resume

def die_while_saving(*args):
    """Runs a script until it saves: the disk holds half of that checkpoint when the process dies."""
    replace = os.replace
    def half(source, target):
        if target.endswith('ckpt.pt'):
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = half
    run(*args)

def kill_at(step, folder, line):
    """Start a command and kill -9 it once its log has reached a step; it was still running then."""
    process = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if len(read_log(folder)) > step:
            process.kill()
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL

@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_resume_after_kill_is_bit_equal(dataset, tmp_path, dtype):
    """Killed at random steps between checkpoints and once while one is written, in training and in recalibration. With
    bf16 it works with bf16 copies of its weights; the checkpoint has the fp32 ones."""
    seed = time.time_ns()
    print('kills drawn with seed', seed)
    rng = np.random.default_rng(seed)
    train_args = [*TINY, f'--data_dir={dataset}', '--order=topic', '--cycles=2', '--max_iters=60', '--eval_interval=10']
    for script, kind, args in (('train.py', 'rope', train_args), ('drope.py', 'drope', ['--recal_iters=60'])):
        whole, killed = (f'{tmp_path}/{name}_{kind}/seed0' for name in ('whole', 'killed'))
        succeeds(run(script, *args, f'--dtype={dtype}', f'--run={tmp_path}/whole_rope/seed0'))
        again = script, *args, f'--dtype={dtype}', f'--run={tmp_path}/killed_rope/seed0'
        kill_at(rng.integers(1, 9), killed, command(*again))        # only the checkpoint of step 0 is there
        kill_at(rng.integers(12, 45), killed, command(*again))      # between two
        died = spawn([sys.executable, '-c', f'import test_train; test_train.die_while_saving(*{again})'], HERE)
        assert died.returncode == -signal.SIGKILL and os.path.exists(f'{killed}/ckpt.pt.tmp')
        succeeds(run(*again))
        matrices = [w for w in weights(killed).values() if w.ndim == 2]
        assert same(weights(killed), weights(whole)) and {w.dtype for w in weights(whole).values()} == {torch.float32}
        assert not all(torch.equal(w, w.bfloat16().float()) for w in matrices)
        assert [r['step'] for r in read_log(killed)] == list(range(61))    # the log has no gaps and no repeats
        assert losses(killed).tolist() == losses(whole).tolist()
    assert not same(weights(f'{tmp_path}/whole_rope/seed0'), weights(whole))

# -----------------------------------------------------------------------------
# the step

STEP = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, mlp_hidden=48, vocab_size=50, block_size=32,
            rope=True, rope_theta=1e6, max_iters=20, warmup_iters=100, muon_lr=0.0005, adam_lr=3e-3, weight_decay=0.01,
            grad_clip=0.5)

def step_losses(how, device='cpu', dtype='float32', steps=20, **changes):
    """The losses of the first steps, by train.py's step or in plain PyTorch."""
    c = {**STEP, 'grad_accum': 2, **changes}
    g = torch.Generator().manual_seed(0)
    corpus = torch.randint(c['vocab_size'], (100, c['block_size'] + 1), generator=g, dtype=torch.int32)
    corpus[:, 1::2] = (corpus[:, :-1:2] + 1) % c['vocab_size']               # every other token can be learned
    corpus = corpus.to(device)
    batches = torch.randint(100, (c['max_iters'], c['grad_accum'], c.get('micro', 4)), generator=g).to(device)
    model = build(c).to(device)
    losses = []
    if how == 'plain':
        step = plain_step(model, c, corpus, batches, dtype)
        losses = [step().item() for _ in range(steps)]
    else:
        muon, adamw = optimizers(model, c, dtype, how == 'compiled')
        loss_of = compiled(model) if how == 'compiled' else model
        step, loss_sum = training_step(model, loss_of, muon, adamw, c, corpus, batches, 0, dtype)
        for _ in range(steps):
            step()
            losses.append(loss_sum.item())
            loss_sum.zero_()
    return np.array(losses)

@pytest.mark.parametrize('how', ('eager', 'compiled'))
def test_step_is_plain_pytorch(how):
    """20 steps beside eager PyTorch, torch.optim.Muon, torch.optim.AdamW and a schedule in Python, losses to 1e-5; at
    a Muon rate that keeps bf16 from making more of rounding than that (see the two processes below)."""
    if how == 'compiled' and not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler')
    plain, ours = step_losses('plain'), step_losses(how)
    assert plain[0] - plain[-1] > 0.1                              # it is learning
    assert abs(ours - plain).max() < 1e-5
    for clip in (0.0, 100.0):                                      # off, and never reached
        unclipped = [step_losses(name, grad_clip=clip) for name in (how, 'plain')]
        assert abs(unclipped[0] - unclipped[1]).max() < 1e-5
    for other in ({'grad_clip': 0.0}, {'muon_lr': 0.000505}, {'adam_lr': 0.00303}, {'weight_decay': 0.1}):
        assert abs(ours - step_losses('plain', **other)).max() > 3e-5       # each of these is seen

@pytest.mark.skipif(not torch.cuda.is_available(), reason='a CUDA graph needs a GPU')
def test_graphed_step_is_plain_pytorch():
    """In bf16 on a GPU, compiled and as one CUDA graph: 200 losses within 0.01 nats of plain PyTorch's."""
    shape = dict(n_embd=128, head_dim=32, mlp_hidden=256, n_layer=4, micro=64, grad_accum=1, max_iters=200)
    plain, ours = (step_losses(how, 'cuda', 'bfloat16', 200, **shape) for how in ('plain', 'compiled'))
    assert plain[0] - plain[-1] > 1 and abs(ours - plain).max() < 0.01

def test_layers_and_arms_share_compiled_code(monkeypatch):
    """Embedding, block and losses are compiled once, whatever the layer or seed; without RoPE the block is another."""
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    with_backend = functools.partial(torch.compile, backend='aot_eager')
    monkeypatch.setattr(torch, 'compile', lambda part, options=None: with_backend(part))
    for seed, rope, graphs in ((0, True, 3), (1, True, 3), (2, False, 4), (3, False, 4), (4, True, 4)):
        model = build({**STEP, 'rope': rope, 'seed': seed})
        idx = torch.randint(50, (4, 33), generator=torch.Generator().manual_seed(seed))
        compiled(model)(idx[:, :-1], idx[:, 1:]).mean().backward()
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before + graphs

# -----------------------------------------------------------------------------
# processes and micro-batches

@pytest.mark.parametrize('n, muon_lr, grad_accum', ((2, 0.02, 2), (4, 0.0005, 1)))
def test_processes_and_micro_batches_match_one(dataset, tmp_path, n, muon_lr, grad_accum):
    """n gloo processes, also killed and ended by one, against one at equal global batch. At full rates only where
    gradients are summed in the same order, as with two micro-batches: Muon enlarges what holds next to nothing, 1e-7
    in a sum to 1% in 20 such steps."""
    args = [*TINY, '--n_head=4', '--n_embd=64', '--head_dim=16', '--mlp_hidden=176', '--batch_size=32',
            '--max_iters=20', f'--data_dir={dataset}', '--order=topic', '--eval_interval=5', f'--muon_lr={muon_lr}']
    run_of = lambda name: f'{tmp_path}/{name}/mha_topic_ordered_rope/seed0'
    kill_at(7, run_of('killed'), command('train.py', *args, f'--out_dir={tmp_path}/killed', n=n))
    succeeds(spawn(command('train.py', *args, f'--out_dir={tmp_path}/many', n=n)))
    for name in ('one', 'killed'):
        succeeds(run('train.py', *args, f'--grad_accum={grad_accum}', f'--out_dir={tmp_path}/{name}'))
    many, one, killed = map(run_of, ('many', 'one', 'killed'))
    assert len(losses(one)) == 21 and np.ptp(losses(one)[1:, 0]) > 0.01            # it is learning
    for other in (many, killed):
        a, b = weights(other), weights(one)
        worst = max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)
        assert abs(losses(other) - losses(one)).max() < 1e-4 and worst < 1e-3

def test_bench_compares_numbers_of_processes(tmp_path):
    """One process, then two: a table in which each has its rows, at equal global batch and at as many rows each."""
    args = [*TINY, '--vocab_size=20', '--block_size=32', '--bench_steps=10', '--scaling=True']
    for n in (2, 1, 2):
        succeeds(spawn(command('bench.py', *args, n=n), tmp_path) if n > 1 else run('bench.py', *args, cwd=tmp_path))
    one, same, more = read_json(tmp_path / 'out/bench/default_scaling.json')['rows']
    assert [(row['gpus'], row['batch_size']) for row in (one, same, more)] == [(1, 8), (2, 8), (2, 16)]
    assert more['ratio'] == pytest.approx(16 / more['ms_per_step'] / (8 / one['ms_per_step'])) and one['ratio'] == 1

def test_the_environment_is_told_in_one_line(dataset, tmp_path):
    good = [*TINY, f'--data_dir={dataset}', '--max_iters=2', f'--run={tmp_path}/run']
    alone = spawn(command('train.py', *good), env={'RANK': '0', 'WORLD_SIZE': '1'})
    refuses(alone, 'RANK', 'MASTER_ADDR', 'torchrun')
    (tmp_path / 'windows.py').write_bytes(b'\xef\xbb\xbfmax_iters = 2\r\neval_rows = 3\r\n')
    succeeds(run('train.py', f'{tmp_path}/windows.py', *good))
    succeeds(spawn(command('plot.py', tmp_path), env={'MPLBACKEND': 'module://nowhere'}))      # not analysed yet
    assert set(os.listdir(tmp_path / 'figures')) == {'loss.png', 'order.png'}
    assert value(row_of_log(f'{tmp_path}/run'), 'val_loss') > 0

def test_cores_that_may_be_used():
    one_core = ['taskset', '-c', '0', sys.executable, '-c', 'import machine as m; print(m.threads(), m.threads(9))']
    assert spawn(one_core, HERE).stdout == '1 1\n'

# -----------------------------------------------------------------------------
# DroPE

def test_drop_and_kept_control(dataset, tmp_path):
    """The dropped and the kept run read the same rows at the same rates and differ in RoPE alone."""
    parent = f'{tmp_path}/mha_shuffled_rope/seed0'
    succeeds(run('train.py', *TINY, f'--data_dir={dataset}', f'--run={parent}', '--max_iters=40'))
    drope, kept = f'{tmp_path}/mha_shuffled_drope/seed0', f'{tmp_path}/mha_shuffled_kept/seed0'
    for keep in (False, True):
        assert not os.path.exists(kept)
        succeeds(run('drope.py', f'--run={parent}', '--recal_iters=0.5,4,0', f'--keep_rope={keep}'))
    for sub, steps in (('', 20), ('/recal_4', 4)):
        a, b = (read_json(f + sub + '/config.json') for f in (drope, kept))
        assert {k for k in a if a[k] != b[k]} == {'rope', 'keep_rope'} and a['max_iters'] == steps
        rows = [torch.load(f + sub + '/ckpt.pt', weights_only=True)['rows'] for f in (drope, kept)]
        assert rows[0] == rows[1]
    first = [read_log(folder)[0]['val_loss'] for folder in (drope, kept)]
    assert first[1] == pytest.approx(losses(parent)[-1, 1], abs=1e-6)      # kept begins where the parent ended
    assert abs(first[0] - first[1]) > 1e-5                                 # without RoPE it is another function
    assert same(weights(f'{drope}/recal_0'), weights(parent)) and not os.path.exists(f'{kept}/recal_0')
    assert losses(f'{drope}/recal_0').tolist() == losses(drope)[:1].tolist()         # dropped, and nothing else
