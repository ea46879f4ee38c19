"""
The optimizers: Muon for the matrices of the blocks, AdamW for the rest. Both work on stacks of parameters, not on one
after another; nothing in them waits for the host, and Muon's work is shared by all processes.
"""
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw as adamw_step

from machine import processes

def newton_schulz(x):
    """Five quintic Newton-Schulz steps towards the nearest semi-orthogonal matrix, in bf16. x: [n, rows, cols]
    (Jordan 2024, kellerjordan.github.io/posts/muon; the coefficients and rounding of torch.optim.Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(1) > x.size(2)
    for _ in range(5):
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x

def muon_step(grad, momentum, master, weights, lr, weight_decay, clip):
    """A step of matrices of one shape, in place. grad, momentum, the fp32 weights `master` and the copy of them that
    the model works with: [n, rows, cols]; lr and clip, a factor of the gradients: []."""
    grad = grad.float() * clip
    momentum.lerp_(grad, 1 - 0.95)
    x = grad.lerp(momentum, 0.95).bfloat16()                # Nesterov
    update = newton_schulz(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))
    rate = lr * math.sqrt(max(1, update.size(1) / update.size(2)))
    master.mul_(1 - lr * weight_decay).sub_(update.float() * rate)
    if weights.dtype != master.dtype:                       # else they are one tensor
        weights.copy_(master)

class Muon:
    """torch.optim.Muon, the matrices of one shape stacked, and nothing that syncs. Parameters become views of their
    stack, of dtype; what is updated is fp32 (`master`: parameter -> its fp32 weights), as under autocast. Of several
    processes each updates an equal share of every stack, which zeros fill up, and all get the weights of all."""
    @torch.no_grad()
    def __init__(self, params, lr, weight_decay, dtype=torch.float32, compile=False):
        self.lr = lr
        self.weight_decay = weight_decay
        self.update = torch.compile(muon_step, dynamic=False) if compile else muon_step
        rank, self.world = processes()
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        self.stacks = []
        self.master = {}
        for shape, group in by_shape.items():
            share = math.ceil(len(group) / self.world)
            master = group[0].new_zeros(self.world * share, *shape)
            master[:len(group)] = torch.stack(group)
            weights = master.to(dtype)                      # the same tensor where that is fp32
            self.stacks.append(SimpleNamespace(
                params=group,
                master=master,
                weights=weights,
                momentum=torch.zeros_like(master),
                grads=torch.zeros_like(weights),
                mine=slice(rank * share, (rank + 1) * share)))
            for p, p_master, p_weights in zip(group, master, weights):
                self.master[p] = p_master
                p.data = p_weights

    def take_gradients(self):
        """The gradients of this process's share, summed over all processes: a list of [n, rows, cols]."""
        for stack in self.stacks:
            torch.stack([p.grad for p in stack.params], out=stack.grads[:len(stack.params)])
            if self.world > 1:
                dist.reduce_scatter_tensor(stack.grads[stack.mine], stack.grads)
        return [stack.grads[stack.mine] for stack in self.stacks]

    @torch.no_grad()
    def step(self, scale, clip):
        """scale: what the schedule makes of the rate, clip: what clipping makes of the gradient; fp32 [], on device."""
        for stack in self.stacks:
            own = [x[stack.mine] for x in (stack.grads, stack.momentum, stack.master, stack.weights)]
            self.update(*own, self.lr * scale, self.weight_decay, clip)
        self.gather('weights')

    def gather(self, *names):
        """Give these stacks, of which each process has its share, to all of them."""
        if self.world == 1:
            return
        for stack in self.stacks:
            for name in names:
                whole = getattr(stack, name)
                dist.all_gather_into_tensor(whole, whole[stack.mine])

class AdamW:
    """torch.optim.AdamW of its parameters as one fp32 vector, of which they become views. The class itself would import
    the compiler, which takes seconds."""
    def __init__(self, params, lr, weight_decay):
        self.params = params
        sizes = [p.numel() for p in params]
        self.weights = torch.cat([p.detach().flatten() for p in params])
        for p, part in zip(params, self.weights.split(sizes)):
            p.data = part.view_as(p)
        self.lr = torch.tensor(lr, device=self.weights.device)               # on the device: a graph reads it there
        self.weight_decay = weight_decay
        self.state = {
            'exp_avg': torch.zeros_like(self.weights),
            'exp_avg_sq': torch.zeros_like(self.weights),
            'step': torch.zeros_like(self.lr)}

    @torch.no_grad()
    def step(self, grad, scale):
        """grad: of all parameters, one vector; scale: what the schedule makes of the rate, fp32 [], on device."""
        mean, square, step = self.state.values()
        adamw_step(
            [self.weights], [grad], [mean], [square], [], [step],
            lr=self.lr * scale,
            beta1=0.9,
            beta2=0.95,
            weight_decay=self.weight_decay,
            eps=1e-8,
            fused=True,
            amsgrad=False,
            maximize=False)

def split_parameters(model):
    """(2D matrices of the blocks, for Muon; embedding and norm gains, for AdamW)."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and '.layers.' in name else others).append(p)
    return matrices, others

def optimizers(model, c, dtype, compile, ckpt=None):
    """(Muon, AdamW) of a model as it is now, with the rates and the decay of its config, as they were at `ckpt`."""
    matrices, others = split_parameters(model)
    assert sorted(map(id, matrices + others)) == sorted(map(id, model.parameters()))     # each in exactly one group
    # the matrices may be bf16, which saves casting them and their gradients, where gradients are not added up
    bf16 = dtype == 'bfloat16' and c['grad_accum'] == 1
    matrix_dtype = torch.bfloat16 if bf16 else torch.float32
    muon = Muon(matrices, c['muon_lr'], c['weight_decay'], matrix_dtype, compile)
    adamw = AdamW(others, c['adam_lr'], c['weight_decay'])
    if ckpt:
        for stack, saved in zip(muon.stacks, ckpt['optimizer']['muon']['momentum'], strict=True):
            stack.momentum[:len(saved)] = saved
        adamw.state = ckpt['optimizer']['adamw']
    return muon, adamw
