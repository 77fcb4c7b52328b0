"""Scratch memory that outlives a call.

A buffer of some megabytes that is allocated anew at every decode step costs a page fault for every
4 KiB of it, more than the copy that it is for.
"""

import math
import threading

import torch

# A larger buffer is handed out, but not kept.
KEPT_BYTES = 64 << 20

_local = threading.local()


def scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised, contiguous tensor, valid until this thread asks for the name again.

    Args:
        name: one of the few fixed names of its callers; each holds at most `KEPT_BYTES` a device.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    buffers = _local.__dict__
    buffer = buffers.get((name, device))
    if buffer is None or buffer.numel() < num_bytes:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if num_bytes <= KEPT_BYTES:
            buffers[name, device] = buffer
    return buffer[:num_bytes].view(dtype).view(shape)
