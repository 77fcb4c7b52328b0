"""Pools that grow: new pages come before the last one, the null page."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch

Fields = TypeVar("Fields", bound=NamedTuple)


def widen(pool: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Insert `count` entries of zeros before the last one of `dim`."""
    size = pool.shape[dim]
    shape = list(pool.shape)
    shape[dim] = size + count
    wide = pool.new_zeros(shape)
    wide.narrow(dim, 0, size - 1).copy_(pool.narrow(dim, 0, size - 1))
    wide.narrow(dim, size + count - 1, 1).copy_(pool.narrow(dim, size - 1, 1))
    return wide


def growth_bytes(tensors: Iterable[torch.Tensor | None], size: int, count: int) -> int:
    """What `count` more entries take, of tensors that have `size` each."""
    return count * sum(t.nbytes // size for t in tensors if t is not None)


def widen_fields(pool: Fields, count: int) -> Fields:
    """`widen` for `KVPages` and sketches: pages lie along dimension 1, or 0 of one alone."""
    tensors = {name: t for name, t in pool._asdict().items() if isinstance(t, torch.Tensor)}
    return pool._replace(**{n: widen(t, count, min(1, t.dim() - 1)) for n, t in tensors.items()})
