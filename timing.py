"""How long calls take, on machines whose speed changes from minute to minute."""

import time

import torch


def seconds_of(functions, repeats, device=None, warm_up=2):
    """Calls the functions in turns -> for each the seconds of its `repeats` calls, those of the first `warm_up` rounds left out."""
    seconds = [[] for _ in functions]
    for _ in range(warm_up + repeats):
        for function, found in zip(functions, seconds):
            started = time.perf_counter()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    return [found[warm_up:] for found in seconds]
