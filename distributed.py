"""Several processes that train one model (torchrun): who they are, their share of a batch, and what they have to agree on.

Every function does nothing, or gives back what it was given, where there is one process.
"""

import gc
import os
import re
import sys
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from devices import choose_device
from errors import UserError


def start():
    """-> rank, number of processes, device. All but the first print nothing but errors."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = choose_device(local if world > 1 else None)
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, world, device


def finish():
    """Lets go of the other processes. Call it when nothing else holds a replicated model: gloo's threads live as long as one does, and
    the interpreter aborts now and then where it ends while they give up a tensor."""
    if several():
        with suppress(RuntimeError):  # another process may be lost
            dist.barrier()  # so that they have given up all others; a sharded model's mesh keeps them longer than can be waited for
        dist.destroy_process_group()
        gc.collect()


def several():
    return dist.is_available() and dist.is_initialized()


def is_first():
    return not several() or dist.get_rank() == 0


def share(things):
    """-> those of a list that this process sees to. All get equally many, for they have to meet at every batch: some come twice."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)
    return [things[i % len(things)] for i in range(rank, -(-len(things) // world) * world, world)]


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


# One model on several processes: each has all of it, or, where it is sharded, a part of its backbone


def shard(backbone, device):
    """Spreads a backbone's weights over the processes, and with them its gradients and the optimiser's state; a block's are gathered when
    it is needed. On several machines as on one."""
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)  # nothing changes the maps in place
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in max((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), key=len):
        fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh)


def synchronize_norms(model, device):
    """model -> the same with batch norms that take their statistics from all processes' images. PyTorch has these on GPUs alone;
    elsewhere each process keeps to its own images, and that is printed."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not several() or not norms:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"{len(norms)} batch norms: each process takes the statistics of its own images; they are synchronised on GPUs alone")
    return model


def agree_on_buffers(*models):
    """All processes take the first one's buffers, as batch norms' running statistics."""
    if several():
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def replicate(model):
    """The model whose backward pass averages the gradients over the processes; those of a sharded part are averaged already."""
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return DistributedDataParallel(model, find_unused_parameters=True)  # no device_ids: masks stay on the host, see layers.is_padded


def local(tensor):
    """This process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state):
    """A model's or an optimiser's state -> the same with nothing sharded, on the CPU what was. All processes have to ask for it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def like(value, sharded):
    """The other way round: a whole tensor -> this process's part, where `sharded` is one."""
    return distribute_tensor(value, sharded.device_mesh, sharded.placements) if isinstance(sharded, DTensor) and value.shape == sharded.shape else value


def load(model, optimizers, state):
    """Fills a model and its optimisers from {"model", "optimizers"}, their whole states."""
    own = model.state_dict()
    model.load_state_dict({key: like(value, own.get(key)) for key, value in state["model"].items()})
    for optimizer, content in zip(optimizers, state.get("optimizers", [])):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {i: {key: like(value, parameters[i]) for key, value in values.items()} for i, values in content["state"].items()}
        optimizer.load_state_dict(content | {"state": parts})


def clip_gradients(parameters, longest):
    """Shortens all gradients together to that norm -> their norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not parts:
        return clip_grad_norm_(parameters, longest)
    wholes = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = get_total_norm(parts) ** 2
    dist.all_reduce(square)
    norm = (square + get_total_norm(wholes) ** 2).sqrt()
    torch._foreach_mul_(parts + wholes, (longest / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def lost_process(save, folder):
    """Around the training: where another process is gone, saves what can be saved (save may be None) and says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not several() or not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise  # a fault of this process's own
        if save is not None:
            save()
        go_on = f"go on with: torchrun ... train.py --resume {folder}" if (folder / "last.pth").exists() else "nothing was saved yet"
        raise UserError(f"another process was lost ({str(error).strip().splitlines()[0][:120]}); {go_on}") from None


@contextmanager
def first_goes_first():
    """The first process runs the body before the others do, so that what it makes is there for them."""
    if not is_first():
        dist.barrier()
    yield
    if several() and is_first():
        dist.barrier()
