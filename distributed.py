"""Several processes that train one model (torchrun): who they are, their share of a batch, and what they have to agree on.

Every function does nothing, or gives back what it was given, where there is one process.
"""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import UserError


def start():
    """-> rank, number of processes, device. All but the first print nothing but errors."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{local}" if cuda and world > 1 else "cuda" if cuda else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if world > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, world, device


def several():
    return dist.is_available() and dist.is_initialized()


def mean_of(value, device):
    """A number or tensor -> its mean over the processes."""
    if not several():
        return value
    total = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def share_of(count, device):
    """A count of what a loss is averaged over, one at least -> what each process divides its own sum by, so that the mean of their losses
    is the loss of one process with the whole batch."""
    if not several():
        return max(1, count)
    world = dist.get_world_size()
    return float(mean_of(count, device).clamp(min=1 / world))


def most_of(values, device):
    """Numbers -> the largest of any process, each: what all of them go by."""
    if not several():
        return values
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def from_first(value):
    """Any picklable value -> the first process's."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(found):
    """A dictionary -> those of all processes together."""
    if not several():
        return found
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, found)
    return {key: value for box in boxes for key, value in box.items()}


@contextmanager
def lost_process(save, folder):
    """Around the training: where another process is gone, saves what can be saved and says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not several() or not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise  # a fault of this process's own
        save()
        raise UserError(f"another process was lost ({str(error).strip().splitlines()[0][:120]}); go on with: torchrun ... train.py --resume {folder}") from None


@contextmanager
def first_goes_first():
    """The first process runs the body before the others do, so that what it makes is there for them."""
    if several() and dist.get_rank():
        dist.barrier()
    yield
    if several() and not dist.get_rank():
        dist.barrier()
