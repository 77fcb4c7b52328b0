"""Pools grow where they lie."""

import mmap
import resource

import pytest
import torch

from pikv_megatron.cache.pages import address_space
from pikv_megatron.cache.pages.widen import ROOM, widen


def numbers(dim: int) -> torch.Tensor:
    """Three entries, the last one of 7."""
    shape = (3, 4) if dim == 0 else (2, 3, 4)
    pool = torch.rand(shape)
    pool.select(dim, 2).fill_(7.0)
    return pool


def check(wide: torch.Tensor, pool: torch.Tensor, dim: int, size: int) -> None:
    assert wide.shape[dim] == size
    assert torch.equal(wide.narrow(dim, 0, 2), pool.narrow(dim, 0, 2))
    assert not wide.narrow(dim, 2, size - 3).any()
    assert (wide.select(dim, size - 1) == 7.0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_pool_moves_once_and_then_grows_in_place(dim):
    pool = numbers(dim)
    once = widen(pool, 5, dim)
    check(once, pool, dim, 8)
    twice = widen(once, 40, dim)
    check(twice, pool, dim, 48)
    assert twice.data_ptr() == once.data_ptr() != pool.data_ptr()
    check(widen(twice, 8 * ROOM, dim), pool, dim, 48 + 8 * ROOM)


@pytest.mark.parametrize("dim", [0, 1])
def test_without_address_space_it_is_copied(dim, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no address space")

    monkeypatch.setattr(address_space.mmap, "mmap", refuse)
    pool = numbers(dim)
    once = widen(pool, 5, dim)
    check(widen(once, 3, dim), pool, dim, 11)


def test_room_takes_no_memory():
    page = mmap.PAGESIZE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = widen(torch.zeros(4, 1, page), 1 << 16, 1)
    pool = widen(pool, 1 << 16, 1)
    assert pool.nbytes > 8 << 30 and not pool[:, -2].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
