"""Training one model with several processes (torchrun): ranks, collectives, replicated and sharded models.

With a single process every function does nothing, or returns its argument.
"""

import ctypes
import gc
import math
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from devices import choose_device


def start():
    """Joins the process group, if torchrun started several processes -> this one's device.

    Afterwards only the main process prints.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)) if several else None)
    if several and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        if int(os.environ.get("RANK", 0)) > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def finish():
    """Leaves the process group. Call it when nothing else holds a replicated model.

    gloo's threads live as long as such a model, and the interpreter sometimes aborts if it ends while they release a
    tensor.
    """
    if is_distributed():
        with suppress(RuntimeError):  # another process may be lost
            # Wait until all have released their models. A sharded model's mesh keeps it for longer than one can wait.
            dist.barrier()
        dist.destroy_process_group()
        gc.collect()


# Processes and collectives


def is_distributed():
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def is_main_process():
    """Whether this is the process that prints and writes files: the first, or the only one."""
    return not is_distributed() or dist.get_rank() == 0


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def my_part(things):
    """A list of batches -> those of this rank.

    The list is padded by wrapping around, so that all ranks have the same number of batches.
    """
    world = world_size()
    padded_length = math.ceil(len(things) / world) * world
    return [things[i % len(things)] for i in range(rank(), padded_length, world)]


def all_reduce_mean(value, device):
    """A number or tensor -> its mean over the processes, float32 on `device`."""
    if not is_distributed():
        return value
    total = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_count(count, device):
    """The count that a loss is averaged over -> its mean over the processes, by which each divides its own sum.

    The mean of their losses is then the loss of one process with the whole batch. The whole batch counts as 1 at least.
    """
    if not is_distributed():
        return max(1, count)
    world = dist.get_world_size()
    return all_reduce_mean(count, device).clamp(min=1 / world)


def all_reduce_max(values, device):
    """A list of numbers -> for each the largest of all processes."""
    if not is_distributed():
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def broadcast(value):
    """Any picklable value -> that of the main process."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def all_gather(found):
    """A dictionary -> the union of all processes' dictionaries; later ranks take precedence."""
    if not is_distributed():
        return found
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, found)
    return {key: value for part in by_rank for key, value in part.items()}


@contextmanager
def main_process_first():
    """The main process runs the body before the others do, so that the files that it makes are there for them."""
    if not is_main_process():
        dist.barrier()
    yield
    if is_distributed() and is_main_process():
        dist.barrier()


def is_lost_process(error):
    """Whether an error of this process was caused by the end of another one."""
    if not is_distributed() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(re.search("gloo|nccl", str(error), re.IGNORECASE))


# One model on several processes: replicated, or with a sharded backbone


def shard(backbone, device):
    """Shards a backbone's weights over the processes (FSDP), in place, and thereby its gradients and optimiser state.

    The weights of a block are gathered when it is needed. The processes may be on several machines.
    """
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)  # nothing changes the maps in place
    from torch.distributed.device_mesh import init_device_mesh  # here, as FSDP takes a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList)]
    for blocks in lists:
        for block in blocks if len(blocks) == max(map(len, lists)) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh)


def synchronize_norms(model, device):
    """model -> the same with batch norms whose statistics come from the images of all processes.

    PyTorch has them on GPUs only. Elsewhere each process uses its own images, and a message says so.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not is_distributed() or not norms:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(
        f"{len(norms)} batch norms: each process takes the statistics of its own images; only GPUs can synchronise them"
    )
    return model


def broadcast_buffers(*models):
    """All processes take the main process's buffers, such as the running statistics of batch norms."""
    if is_distributed():
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def replicate(model):
    """model -> a wrapper whose backward pass averages the gradients over the processes.

    Those of a sharded part are left alone: sharding averages them already.
    """
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    # No device_ids, with which the masks would be moved from the host, see layers.is_padded.
    return DistributedDataParallel(model, find_unused_parameters=True)


def is_sharded(value):
    """Whether it is a DTensor, told without importing that class."""
    return hasattr(value, "full_tensor")


def local_shard(tensor):
    """A tensor that may be sharded -> this process's shard of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def unshard(state):
    """A model's or an optimiser's state -> the same with whole tensors; those that were sharded are on the CPU.

    A collective: all processes have to call it.
    """
    if isinstance(state, dict):
        return {key: unshard(value) for key, value in state.items()}
    return state.full_tensor().cpu() if is_sharded(state) else state


def shard_like(value, sharded):
    """A whole value -> this process's shard, if `sharded` is a sharded tensor of its shape; else the value itself."""
    if is_sharded(sharded) and value.shape == sharded.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, sharded.device_mesh, sharded.placements)
    return value


def load(model, optimizers, state):
    """Fills a model and its optimisers, sharded or not, from their whole states {"model", "optimizers"}."""
    current = model.state_dict()
    model.load_state_dict({key: shard_like(value, current.get(key)) for key, value in state["model"].items()})
    for optimizer, saved in zip(optimizers, state.get("optimizers", [])):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sharded = {}
        for i, values in saved["state"].items():
            sharded[i] = {key: shard_like(value, parameters[i]) for key, value in values.items()}
        optimizer.load_state_dict(saved | {"state": sharded})


def clip_gradients(parameters, longest):
    """Scales all gradients, in place, so that their total norm is `longest` at most -> the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]
    if not shards:
        return clip_grad_norm_(parameters, longest)
    replicated = [gradient for gradient in gradients if not is_sharded(gradient)]
    square = get_total_norm(shards) ** 2
    dist.all_reduce(square)
    norm = (square + get_total_norm(replicated) ** 2).sqrt()
    torch._foreach_mul_(shards + replicated, (longest / (norm + 1e-6)).clamp(max=1.0))
    return norm


# Worker processes


def start_worker(_=None):
    """worker_init_fn of DataLoaders and pools.

    The worker leaves signals to the parent, those to its whole group too, dies with the parent, and keeps freed memory:
    returning it to the kernel costs 25 % of loading.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # torchrun and timeout send SIGTERM to the group
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc:
        set_parent_death_signal = 1
        libc.prctl(set_parent_death_signal, signal.SIGKILL)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
