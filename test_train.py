"""Order, resume, processes and DroPE: the real scripts, tiny, on datasets made here."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import shards
from bench import plain_step
from model import build
from train import compiled, dominant_topic, lr_scale, optimizers, row_order, steps_since, training_step

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--head_dim=8', '--mlp_hidden=24', '--batch_size=8',
        '--adam_lr=0.003', '--log_interval=1', '--device=cpu']

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

def run(script, *args, cwd=None, env={}):
    """A script as a person would run it, on one CPU thread."""
    script = script if cwd else os.path.join(HERE, script)
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, env=ENV | env, cwd=cwd)

def drawn_again(results, tmp_path):
    """Figures of a published experiment: drawn anew from its JSON, and as published, both {name: bytes}."""
    copy = shutil.copytree(results, tmp_path / os.path.basename(results), ignore=shutil.ignore_patterns('figures'))
    done = run('plot.py', str(copy))
    assert done.returncode == 0, done.stderr
    return [{name: open(f'{folder}/figures/{name}', 'rb').read() for name in os.listdir(f'{folder}/figures')}
            for folder in (copy, results)]

@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """100 rows of 33 tokens over 20 symbols and 3 topics, of unequal sizes; no structure is needed here."""
    rng = np.random.default_rng(0)
    topics = rng.choice(3, (100, 1), p=(0.5, 0.3, 0.2)) + np.zeros((100, 33), int)
    topics[:, 20:] = rng.integers(0, 3, (100, 1))
    tokens = (rng.integers(0, 20, (100, 33)) + topics) % 20
    folder = str(tmp_path_factory.mktemp('data') / 'tiny')
    shards.write(folder, dict(train=tokens, train_topics=topics, val=tokens[:16], val_topics=topics[:16]),
                 dict(vocab_size=20, block_size=32, n_topics=3))
    return folder

def weights(folder):
    return torch.load(os.path.join(folder, 'ckpt.pt'), weights_only=True)['model']

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# -----------------------------------------------------------------------------
# order

LABELS = np.random.default_rng(0).choice(4, 100, p=(0.4, 0.3, 0.2, 0.1))
ARMS = [('shuffled', 1), ('topic', 1), ('topic', 4), ('pseudo', 1), ('pseudo', 4)]

@pytest.mark.parametrize('n_rows', (100, 300, 250, 64))            # whole epochs, and fractions of one
@pytest.mark.parametrize('cooldown', (0, 40))
def test_arms_read_the_same_rows_in_every_epoch(n_rows, cooldown):
    reference = row_order(LABELS, n_rows, seed=3)
    assert sorted(reference[:100]) == list(range(100))[:n_rows] or n_rows < 100
    for order, cycles in ARMS:
        rows = row_order(LABELS, n_rows, order, cycles, cooldown, seed=3)
        edges = sorted({*range(0, n_rows, 100), n_rows - cooldown, n_rows})
        for a, b in zip(edges, edges[1:]):
            assert sorted(rows[a:b]) == sorted(reference[a:b])
        assert (rows[n_rows - cooldown:] == reference[n_rows - cooldown:]).all()
        if order != 'shuffled':
            assert not (rows == reference).all()
    assert sorted(row_order(LABELS, n_rows, seed=4)) != sorted(reference) or n_rows % 100 == 0

def test_topic_order_is_blocks():
    n_blocks = lambda x: 1 + int((np.diff(x) != 0).sum())
    rows = row_order(LABELS, 200, 'topic', seed=1)
    assert LABELS[rows[0]] == 1                                    # the order of topics is rotated by seed
    assert n_blocks(LABELS[rows[:100]]) == n_blocks(LABELS[rows[100:]]) == 4
    assert n_blocks(LABELS[row_order(LABELS, 100, 'topic', 5, seed=1)]) == 5 * 4
    reference = row_order(LABELS, 100, seed=1)
    for k in range(4):                                             # stable: the shuffle survives inside a block
        assert (rows[:100][LABELS[rows[:100]] == k] == reference[LABELS[reference] == k]).all()
    pseudo = row_order(LABELS, 100, 'pseudo', seed=1)
    assert n_blocks(LABELS[pseudo]) > 40                  # blocks of another label, which says nothing of topics

def test_dominant_topic_and_learning_rate():
    assert dominant_topic(np.array([[0, 1, 1], [2, 2, 1], [0, 1, 2]]), 3).tolist() == [1, 2, 0]
    lr = [lr_scale(s, 1000, 500) for s in range(1000)]
    assert lr[0] == 1 / 50 and lr[49] == 1 and max(lr) == 1 and 0 < lr[-1] < 1e-5     # warm-up is at most a twentieth
    assert lr_scale(499, 10_000, 500) == 1 and lr_scale(5250, 10_000, 500) == pytest.approx(0.5)

# -----------------------------------------------------------------------------
# resume

DIE_WHILE_SAVING = """
import os, signal, sys, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
save, calls = torch.save, [0]
def half(obj, path):
    calls[0] += 1
    save(obj, path)
    if calls[0] == 2:
        os.truncate(path, os.path.getsize(path) // 2)              # the disk holds half of it when the process dies
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
import runpy
runpy.run_path(sys.argv[0], run_name='__main__')
"""

def kill_at(step, log, *command):
    """Start a script and kill -9 it once its log has reached a step; whether it was still running."""
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command], env=ENV, **quiet)
    while process.poll() is None:
        if os.path.exists(log) and open(log).read().count('"step"') > step:
            process.kill()
            break
        time.sleep(0.001)
    return process.wait() == -signal.SIGKILL

def test_resume_after_kill_is_bit_equal(dataset, tmp_path):
    """Killed at random steps between checkpoints and once while one is written, in training and in recalibration."""
    steps, seed = 60, time.time_ns()
    print('kills drawn with seed', seed)
    rng = random.Random(seed)
    def commands(name):
        parent = f'{tmp_path}/{name}_rope/seed0'
        train = [*TINY, f'--data_dir={dataset}', '--order=topic', '--cycles=2', f'--max_iters={steps}',
                 '--eval_interval=10']
        return {parent: [os.path.join(HERE, 'train.py'), *train, f'--run={parent}'],
                parent.replace('_rope', '_drope'): [os.path.join(HERE, 'drope.py'), f'--run={parent}',
                                                    f'--recal_iters={steps}']}
    for folder, command in commands('whole').items():
        done = run(*command)
        assert done.returncode == 0, done.stderr
    for folder, command in commands('killed').items():
        log, whole = os.path.join(folder, 'log.jsonl'), folder.replace('killed', 'whole')
        assert kill_at(rng.randint(1, 9), log, *command)           # before the first checkpoint
        assert kill_at(rng.randint(12, 45), log, *command)         # after one, between two
        died = subprocess.run([sys.executable, '-c', DIE_WHILE_SAVING, *command], env=ENV, capture_output=True)
        assert died.returncode == -signal.SIGKILL and os.path.exists(os.path.join(folder, 'ckpt.pt.tmp'))
        done = run(*command)
        assert done.returncode == 0, done.stderr
        assert same(weights(folder), weights(whole))
        records, expected = (list(map(json.loads, open(f + '/log.jsonl')))[1:] for f in (folder, whole))
        assert [r['step'] for r in records] == list(range(steps + 1))      # the log has no gaps and no repeats
        assert [(r['loss'], r['val_loss']) for r in records] == [(r['loss'], r['val_loss']) for r in expected]
    assert not same(weights(f'{tmp_path}/whole_rope/seed0'), weights(f'{tmp_path}/whole_drope/seed0'))

def test_bf16_weights_resume_too(dataset, tmp_path):
    """With bf16 it works with bf16 copies of its weights; the checkpoint has the fp32 ones and resumes the same."""
    for name in ('whole', 'killed'):
        folder = f'{tmp_path}/{name}'
        command = [os.path.join(HERE, 'train.py'), *TINY, f'--data_dir={dataset}', '--max_iters=40', '--dtype=bfloat16',
                   '--eval_interval=10', f'--run={folder}']
        if name == 'killed':
            assert kill_at(15, folder + '/log.jsonl', *command)
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert same(weights(f'{tmp_path}/whole'), weights(f'{tmp_path}/killed'))
    assert {w.dtype for w in weights(f'{tmp_path}/whole').values()} == {torch.float32}
    assert not all(torch.equal(w, w.bfloat16().float()) for w in weights(f'{tmp_path}/whole').values() if w.ndim == 2)

# -----------------------------------------------------------------------------
# the step

STEP = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, mlp_hidden=48, vocab_size=50, block_size=32,
            rope=True, rope_theta=1e6, max_iters=20, warmup_iters=100, muon_lr=0.0005, adam_lr=3e-3, weight_decay=0.01,
            grad_clip=0.5)

def step_losses(how, device='cpu', dtype='float32', steps=20, **changes):
    """The losses of the first steps and the weights after them, by train.py's step or in plain PyTorch."""
    c = {**STEP, 'grad_accum': 2, **changes}
    g = torch.Generator().manual_seed(0)
    corpus = torch.randint(c['vocab_size'], (100, c['block_size'] + 1), generator=g, dtype=torch.int32)
    corpus[:, 1::2] = (corpus[:, :-1:2] + 1) % c['vocab_size']               # every other token can be learned
    corpus = corpus.to(device)
    batches = torch.randint(100, (c['max_iters'], c['grad_accum'], c.get('micro', 4)), generator=g).to(device)
    model = build(c, torch.Generator().manual_seed(0)).to(device)
    if how == 'plain':
        step = plain_step(model, c, corpus, batches, dtype)
        losses = [step().item() for _ in range(steps)]
    else:
        fast = how == 'compiled'
        step, loss_sum = training_step(model, compiled(model) if fast else model, *optimizers(model, c, dtype, fast), c,
                                       corpus, batches, 0, dtype, fast and device == 'cuda')
        losses = []
        for _ in range(steps):
            step()
            losses.append(loss_sum.item())
            loss_sum.zero_()
    return np.array(losses), torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])

@pytest.mark.parametrize('how', ('eager', 'compiled'))
def test_step_is_plain_pytorch(how):
    """20 steps beside eager PyTorch, torch.optim.Muon, torch.optim.AdamW and a schedule in Python, losses to 1e-5; at
    a Muon rate that keeps bf16 from making more of rounding than that (see the two processes below)."""
    if how == 'compiled' and not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler')
    plain, theirs = step_losses('plain')
    ours, mine = step_losses(how)
    print(how, abs(ours - plain).max(), (mine - theirs).norm() / theirs.norm())
    assert plain[0] - plain[-1] > 0.1                              # it is learning
    assert abs(ours - plain).max() < 1e-5
    for other in ({'grad_clip': 0.0}, {'muon_lr': 0.000505}, {'adam_lr': 0.00303}, {'weight_decay': 0.1}):
        assert abs(ours - step_losses('plain', **other)[0]).max() > 3e-5       # each of these is seen

@pytest.mark.skipif(not torch.cuda.is_available(), reason='a CUDA graph needs a GPU')
def test_graphed_step_is_plain_pytorch():
    """In bf16 on a GPU, compiled and as one CUDA graph: 200 losses within 0.01 nats of plain PyTorch's."""
    shape = dict(n_embd=128, head_dim=32, mlp_hidden=256, n_layer=4, micro=64, grad_accum=1, max_iters=200)
    plain, ours = (step_losses(how, 'cuda', 'bfloat16', 200, **shape)[0] for how in ('plain', 'compiled'))
    print('largest difference of 200 losses', abs(ours - plain).max())
    assert plain[0] - plain[-1] > 1 and abs(ours - plain).max() < 0.01

def test_arms_share_compiled_code():
    """The second model of the same shape compiles nothing, whatever its seed; without RoPE it is another function."""
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters['stats']
    counts = []
    for seed, rope in ((0, True), (1, True), (2, False), (3, False), (4, True)):
        model = build({**STEP, 'rope': rope}, torch.Generator().manual_seed(seed))
        idx = torch.randint(50, (4, 33), generator=torch.Generator().manual_seed(seed))
        before = compiled['unique_graphs']
        torch.compile(model, backend='aot_eager')(idx[:, :-1], idx[:, 1:]).mean().backward()
        counts.append(compiled['unique_graphs'] - before)
    assert counts == [1, 0, 1, 0, 0]

# -----------------------------------------------------------------------------
# processes and micro-batches

def losses(folder):
    records = list(map(json.loads, open(folder + '/log.jsonl')))[1:]
    return np.array([[r['loss'] or 0, r['val_loss'] or 0] for r in records])

def test_two_processes_and_micro_batches_match_one(dataset, tmp_path):
    """
    Two gloo processes against one, at equal global batch: losses of 20 steps within 1e-4, weights within 1e-3. At full
    rates that holds where the gradients are summed in the same order, as one process with two micro-batches does; with
    the whole batch in one product it holds at a low Muon rate only. Muon makes all directions of a gradient equally
    large, also those that hold next to nothing, and in bf16: 1e-7 in a sum moves a matrix by 1% in 20 full-rate steps.
    """
    args = [*TINY, '--n_head=4', '--n_embd=64', '--head_dim=16', '--mlp_hidden=176', '--batch_size=32',
            '--max_iters=20', f'--data_dir={dataset}', '--order=topic']
    torchrun = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    slow = ['--muon_lr=0.0005']
    for name, launcher, extra in (('two', torchrun, []), ('halves', [], ['--grad_accum=2']),
                                  ('slow two', torchrun, slow), ('slow one', [], slow)):
        done = subprocess.run([sys.executable, *launcher, os.path.join(HERE, 'train.py'), *args, *extra,
                               f'--out_dir={tmp_path}/{name}'], env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    folder = lambda name: f'{tmp_path}/{name}/mha_topic_ordered_rope/seed0'
    for two, one in (('two', 'halves'), ('slow two', 'slow one')):
        x, y = losses(folder(two)), losses(folder(one))
        assert len(x) == 21 and np.ptp(x[1:, 0]) > 0.01            # it is learning
        a, b = weights(folder(two)), weights(folder(one))
        worst = max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)
        print(two, one, abs(x - y).max(), worst)
        assert abs(x - y).max() < 1e-4 and worst < 1e-3

# -----------------------------------------------------------------------------
# DroPE

def test_drop_and_kept_control(dataset, tmp_path):
    """The dropped and the kept run read the same rows at the same rates and differ in RoPE alone."""
    parent = f'{tmp_path}/mha_shuffled_rope/seed0'
    assert run('train.py', *TINY, f'--data_dir={dataset}', f'--run={parent}', '--max_iters=40').returncode == 0
    for keep in (False, True):
        done = run('drope.py', f'--run={parent}', '--recal_iters=0.5,4,0', f'--keep_rope={keep}')
        assert done.returncode == 0, done.stderr
    drope, kept = f'{tmp_path}/mha_shuffled_drope/seed0', f'{tmp_path}/mha_shuffled_kept/seed0'
    for sub, steps in (('', 20), ('/recal_4', 4)):
        a, b = (json.load(open(f + sub + '/config.json')) for f in (drope, kept))
        assert {k for k in a if a[k] != b[k]} == {'rope', 'keep_rope', 'condition'} and a['max_iters'] == steps
        rows = [torch.load(f + sub + '/ckpt.pt', weights_only=True)['rows'] for f in (drope, kept)]
        assert rows[0] == rows[1]
    first = [next(r for r in map(json.loads, open(f + '/log.jsonl')) if 'step' in r)['val_loss'] for f in (drope, kept)]
    assert first[1] == pytest.approx(losses(parent)[-1, 1], abs=1e-6)      # kept begins where the parent ended
    assert abs(first[0] - first[1]) > 1e-5                                 # without RoPE it is another function
    assert same(weights(f'{drope}/recal_0'), weights(parent)) and not os.path.exists(f'{kept}/recal_0')
    assert losses(f'{drope}/recal_0').tolist() == losses(drope)[:1].tolist()         # dropped, and nothing else

def test_validation_by_topic(dataset, tmp_path):
    """The mean over topics, weighted by their tokens, is the validation loss; `since` counts from a topic's block."""
    folder = str(tmp_path / 'run')
    done = run('train.py', *TINY, f'--data_dir={dataset}', f'--run={folder}', '--order=topic', '--max_iters=24',
               '--eval_interval=4')
    assert done.returncode == 0, done.stderr
    records = [r for r in map(json.loads, open(folder + '/log.jsonl')) if r.get('val_loss_topics')]
    counts = np.bincount(shards.read(dataset).val_topics[:, 1:].ravel())
    for r in records:
        assert np.dot(counts, r['val_loss_topics']) / counts.sum() == pytest.approx(r['val_loss'], abs=1e-5)
        assert min(r['since']) == 0 and r['step'] >= max(r['since'])
    assert max(max(r['since']) for r in records) > 4
    topics = np.array([[0, 0], [0, 1], [1, 1], [1, 1], [0, 0]])
    assert steps_since(topics, np.array([0.5, 0.5])).tolist() == [[0, 0], [0, 1], [0, 0], [1, 0], [2, 0], [0, 1]]
