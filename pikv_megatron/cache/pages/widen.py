"""Pools that grow and shrink: the last page is always the null page."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch

from pikv_megatron.cache.pages.address_space import reserved_zeros, room_of

# Address space for so many times what a pool needs when it moves; no memory.
ROOM = 64
Fields = TypeVar("Fields", bound=NamedTuple)


def widen(pool: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Insert `count` entries of zeros before the last one of `dim`, 0 or 1.

    In place, where there is room; if not, the pool moves once more, to where it can grow much.
    """
    size = pool.shape[dim]
    shape = list(pool.shape)
    shape[dim] = size + count
    if room_of(pool, dim) < size + count:
        room = ROOM * (size + count)
        moved = reserved_zeros(shape, dim, room, pool.dtype, pool.device).narrow(dim, 0, size)
        pool = moved.copy_(pool)
    wide = pool.as_strided(shape, pool.stride())
    last = pool.narrow(dim, size - 1, 1)
    wide.narrow(dim, size + count - 1, 1).copy_(last)
    last.zero_()
    return wide


def growth_bytes(tensors: Iterable[torch.Tensor | None], size: int, count: int) -> int:
    """What `count` more entries take, of tensors that have `size` each."""
    return count * sum(t.nbytes // size for t in tensors if t is not None)


def widen_fields(pool: Fields, count: int) -> Fields:
    """`widen` for `KVPages` and sketches: pages lie along dimension 1, or 0 of one alone."""
    tensors = {name: t for name, t in pool._asdict().items() if isinstance(t, torch.Tensor)}
    return pool._replace(**{n: widen(t, count, min(1, t.dim() - 1)) for n, t in tensors.items()})


def narrow(pool: torch.Tensor, kept: torch.Tensor, dim: int) -> torch.Tensor:
    """The entries `kept` [k] and the last one of `dim`, in memory of their own."""
    last = kept.new_tensor([pool.shape[dim] - 1])
    return pool.index_select(dim, torch.cat([kept, last]))


def narrow_fields(pool: Fields, kept: torch.Tensor) -> Fields:
    """`narrow`, as `widen_fields`."""
    tensors = {name: t for name, t in pool._asdict().items() if isinstance(t, torch.Tensor)}
    return pool._replace(**{n: narrow(t, kept, min(1, t.dim() - 1)) for n, t in tensors.items()})
