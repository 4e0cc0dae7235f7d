"""What to compute on, in which precision, and how long it takes: the same choice for every script."""

import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_UNITS = "amx_tile", "avx512_bf16"  # with these a CPU multiplies in bfloat16; others emulate it


def choose_device(local_rank=None):
    """-> torch.device: a CUDA GPU (that rank's own), Apple's GPU, which serves a single process only, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda" if local_rank is None else f"cuda:{local_rank}")
    return torch.device("mps" if torch.backends.mps.is_available() and local_rank is None else "cpu")


def find_device(name=None):
    """A device's name, such as "cpu" or "cuda:1", or None for choose_device's -> torch.device. Raises UserError."""
    if name is None:
        return choose_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # "meta" has no values to copy
        cause = str(error).split("\n")[0][:200]
        raise UserError(f"--device {name}: there is no such device here ({cause})") from None
    return device


def choose_precision(asked, device, training=True):
    """Decides "auto"; any other precision stays.

    auto: bfloat16 where the hardware supports it natively, float16 on GPUs that support that alone, else float32; CPUs
    detect in float32. Also allows TF32 unless float32 was asked for. Raises UserError.
    """
    if asked not in ("auto", *PRECISIONS):
        raise UserError(f"--precision {asked}: has to be auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if asked == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = asked != "float32"
    if asked != "auto":
        return asked
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type == "cuda":  # T4, V100; float16 is slow on older ones
        return "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"
    native = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in CPU_UNITS)
    return "bfloat16" if device.type == "cpu" and training and native else "float32"


def ahead(function, items, threads):
    """Yields function(item) of every item in turn, while threads compute those of the next `threads` items."""
    waiting, pool = deque(), ThreadPoolExecutor(max(1, threads))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def autocast(precision, device):
    """The context in which a network computes in that precision where it is safe."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, PRECISIONS[precision])


def seconds_of(functions, repeats, device=None, warm_up=2):
    """Calls the functions in turns, as a machine's speed changes -> for each the seconds of its `repeats` calls.

    Those of the first `warm_up` rounds are left out.
    """
    seconds = [[] for _ in functions]
    for _ in range(warm_up + repeats):
        for function, found in zip(functions, seconds):
            started = time.perf_counter()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    return [found[warm_up:] for found in seconds]


class Graphed:
    """A network in evaluation whose calls on a GPU are recorded as CUDA graphs, one for each shape of its inputs.

    A network launches a thousand small operations, which takes the host longer than the GPU needs for one image; a
    graph launches them at once. A shape is recorded when it comes for the third time. The outputs of a call are
    overwritten by the next; weights may change in place only. On other devices it is the network itself.
    """

    KEPT = 8  # graphs; images of ever new shapes are computed as they come

    def __init__(self, model):
        self.model, self.counts, self.graphs, self.pool = model, Counter(), {}, None
        self.lock = threading.Lock()  # to be held until the outputs are used

    def __reduce__(self):
        return Graphed, (self.model,)  # a copy records its own

    def __call__(self, images, mask):
        """images (B, 3, H, W) on the device, mask (B, H, W) on the host."""
        shape = tuple(images.shape), bool(mask.any())  # which changes what is computed
        if images.device.type == "cuda" and shape not in self.graphs and len(self.graphs) < self.KEPT:
            self.counts[shape] += 1
            if self.counts[shape] > 2:
                self.graphs[shape] = self.record(images, mask)
        if self.graphs.get(shape) is None:
            return self.model(images, mask)
        graph, own_images, own_mask, outputs = self.graphs[shape]
        torch.cuda.current_stream(images.device).synchronize()  # the last replay has read its mask
        own_images.copy_(images)
        own_mask.copy_(mask)
        graph.replay()
        return outputs

    def record(self, images, mask):
        """-> the graph, its inputs, its outputs; None if the network waits for the host or there is no more memory."""
        kind = torch.get_autocast_dtype("cuda")
        # Weights that autocast casts once and keeps would be gone when the graph runs.
        casting = torch.autocast("cuda", kind, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with torch.cuda.device(images.device), casting:
            stream, before = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
            try:
                images, mask, graph = images.clone(), mask.pin_memory(), torch.cuda.CUDAGraph()
                self.pool = self.pool or torch.cuda.graph_pool_handle()  # shared, as only one runs at a time
                stream.wait_stream(torch.cuda.current_stream())
                torch.cuda.set_sync_debug_mode("error")  # a network that waits fails here, not within the recording
                with torch.cuda.stream(stream):
                    self.model(images, mask)  # libraries choose their kernels in a first call
                torch.cuda.current_stream().wait_stream(stream)
                torch.cuda.set_sync_debug_mode(before)
                with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                    outputs = self.model(images, mask)
            except RuntimeError:
                return None
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return graph, images, mask, outputs
