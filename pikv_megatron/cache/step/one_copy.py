"""The arrays of a step's plan go to the device together."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

# Of every array's first byte: any type may begin there.
ALIGNMENT = 8


def to_device(parts: Sequence[NamedTuple], device: torch.device) -> list[NamedTuple]:
    """The same named tuples, with tensors in place of their arrays.

    On a CPU a tensor is the array's own memory; elsewhere all are parts of one buffer, copied from
    pinned memory without waiting.
    """
    arrays = [np.ascontiguousarray(array) for part in parts for array in part]
    tensors = map(torch.from_numpy, arrays) if device.type == "cpu" else moved(arrays, device)
    return [type(part)._make(islice(tensors, len(part))) for part in parts]


def moved(arrays: Sequence[np.ndarray], device: torch.device) -> Iterator[torch.Tensor]:
    """Arrays as parts of one buffer on the device."""
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    sources = [torch.from_numpy(array) for array in arrays]
    for part, source in zip(buffer.split(sizes), sources):
        _place(part, source).copy_(source)
    there = buffer.to(device, non_blocking=True)
    yield from map(_place, there.split(sizes), sources)


def _place(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of a part as a tensor of the same type and shape."""
    return part[: like.nbytes].view(like.dtype).view(like.shape)
