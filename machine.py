"""
What every script needs of the machine: device and dtype, processes, versions, progress bars, errors as one line.
"""
import atexit
import contextlib
import math
import multiprocessing
import os
import re
import warnings

import joblib
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

COMPILE_PAYS = 1000         # steps; fewer are made before the compiler is done

def machine(device, dtype='', compile=None, steps=math.inf):
    """(torch.device, dtype, compile) with the automatic choices made, for this process and so many steps. Stops with
    one line where there is no such device or dtype."""
    available = torch.cuda.is_available()
    name = device or ('cuda' if available else 'cpu')
    if not re.fullmatch(r'cpu|cuda(:\d+)?' if available else 'cpu', name):
        raise SystemExit(f'device = {name}: not in torch {torch.__version__} here; cpu, or with a GPU cuda or cuda:1')
    if name == 'cuda':                                      # that of torchrun's process, or of an experiment's worker
        name = f'cuda:{os.environ.get("LOCAL_RANK", torch.cuda.current_device())}'
    device = torch.device(name)
    cuda = name != 'cpu'
    if cuda:
        torch.cuda.set_device(device)
    if 'RANK' in os.environ and not dist.is_initialized():  # started by torchrun
        try:
            dist.init_process_group('nccl' if cuda else 'gloo', device_id=device if cuda else None)
        except (ValueError, RuntimeError) as e:
            raise SystemExit(f'RANK is set, but {str(e).splitlines()[0]}; start with torchrun, or unset RANK') from None
        atexit.register(dist.destroy_process_group)
        warnings.filterwarnings('ignore', '.*_tensor. is deprecated', FutureWarning)      # torch 2.13 names them anew
    dtype = dtype or ('bfloat16' if cuda else 'float32')
    if dtype not in ('float32', 'bfloat16'):
        raise SystemExit(f'dtype = {dtype}: float32 or bfloat16')
    return device, dtype, cuda and steps >= COMPILE_PAYS if compile is None else compile

def processes():
    """(number of this process, how many there are)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()

def threads(jobs=1):
    """Threads for each of so many processes, on the cores that this one may use."""
    return max(1, joblib.cpu_count() // jobs)

def versions(device):
    """What a result depends on: {'device', 'versions'}."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    return {'device': name, 'versions': {'torch': torch.__version__, 'numpy': np.__version__}}

def progress(*args, **kwargs):
    """A progress bar on a terminal, in the first process; none in an experiment's children, which shows one for all."""
    return tqdm(*args, disable=processes()[0] or multiprocessing.parent_process(), **kwargs)   # None asks the terminal

@contextlib.contextmanager
def memory_errors(hint):
    """Out of memory, on the GPU or in RAM, as one line that ends with what to do; failures of torch.compile too."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:                # torch.OutOfMemoryError is a RuntimeError
        if type(e).__module__.startswith('torch._'):        # torch._dynamo and torch._inductor
            raise SystemExit(f'torch.compile failed ({type(e).__name__}: {str(e).strip().splitlines()[0]}); '
                             'go on with --compile=False')
        if isinstance(e, MemoryError) or re.search("out of memory|not enough memory|can't allocate memory", str(e)):
            raise SystemExit(f'out of memory: {hint}')
        raise
