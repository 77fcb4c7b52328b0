"""Memory that is taken only where it is written, so that a tensor can grow without being moved."""

import mmap
from math import prod
from typing import Sequence

import torch

# Linux's MAP_NORESERVE, which Python names since 3.13: address space alone is not counted.
_NO_RESERVE = 0x4000


def reserved_zeros(
    shape: Sequence[int], dim: int, room: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeros of a shape; on a CPU, with address space for `room` entries of `dim` instead.

    Where a system grants none, or on a device whose memory is taken when it is asked for, there is
    no room beyond the shape.
    """
    whole = list(shape)
    whole[dim] = room
    memory = _map(prod(whole) * dtype.itemsize) if device.type == "cpu" else None
    if memory is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    tensor = torch.frombuffer(memory, dtype=dtype, count=prod(whole)).view(whole)
    return tensor.narrow(dim, 0, shape[dim])


def room_of(tensor: torch.Tensor, dim: int) -> int:
    """Entries of `dim`, 0 or 1, that its memory has room for, those that it has among them."""
    if dim == 1:
        return tensor.stride(0) // tensor.stride(1)
    return tensor.untyped_storage().nbytes() // (tensor.stride(0) * tensor.element_size())


def _map(num_bytes: int) -> mmap.mmap | None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        return mmap.mmap(-1, num_bytes, flags=flags)
    except (OSError, OverflowError, ValueError):
        return None
