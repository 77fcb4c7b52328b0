"""Sealed pages of one layer on their owner rank, with a free list on the device."""

import torch


class PagePool:
    """`num_pages` pages of S tokens; one more, the null page, takes writes that are to be lost.

    Attributes:
        keys: [ng, num_pages + 1, S, hn].
        values: [ng, num_pages + 1, S, hn].
        position: [num_pages + 1, S], int32.
        earlier_shards: [num_pages + 1, S], int64 replica masks, or None without replicas.
        shard: [num_pages + 1], int32, the shard a page belongs to.
    """

    def __init__(
        self, num_groups: int, page_size: int, head_dim: int, has_replicas: bool,
        dtype: torch.dtype, device: torch.device,
    ):
        shape = (num_groups, 1, page_size, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.position = torch.full((1, page_size), -1, dtype=torch.int32, device=device)
        self.earlier_shards = (
            torch.zeros(1, page_size, dtype=torch.int64, device=device) if has_replicas else None
        )
        self.shard = torch.full((1,), -1, dtype=torch.int32, device=device)
        self._free = torch.empty(0, dtype=torch.int64, device=device)
        self._num_free = torch.zeros((), dtype=torch.int64, device=device)
        self._free_at_least = 0  # host's lower bound on _num_free, spares a synchronisation

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1] - 1

    @property
    def num_free(self) -> int:
        return int(self._num_free)

    def reserve(self, count: int) -> None:
        """See that `count` pages are free, growing the pool where they are not."""
        if self._free_at_least >= count:
            return
        self._free_at_least = self.num_free
        if self._free_at_least < count:
            self._grow(count - self._free_at_least)

    def allocate(self, is_used: torch.Tensor) -> torch.Tensor:
        """Take a page for every True of [c]; the rest get the null page. Reserved before."""
        assert self._free_at_least >= is_used.numel()
        order = torch.cumsum(is_used, 0)
        top = (self._num_free - order).clamp_(min=0)
        pages = torch.where(is_used, self._free[top], self.num_pages)
        self._num_free -= order[-1]
        self._free_at_least -= is_used.numel()
        return pages

    def release(self, pages: torch.Tensor) -> None:
        """Give pages [c] back; they are taken again in the order given."""
        first = self.num_free
        self._free[first : first + pages.numel()] = pages.flip(0)
        self._num_free += pages.numel()
        self._free_at_least += pages.numel()

    def free_pages(self) -> torch.Tensor:
        return self._free[: self.num_free]

    def tensors(self) -> list[torch.Tensor]:
        every = [self.keys, self.values, self.position, self.shard, self.earlier_shards]
        return [t for t in (*every, self._free, self._num_free) if t is not None]

    def _grow(self, count: int) -> None:
        """Add `count` pages before the null page; live pages keep their numbers."""
        old = self.num_pages
        self.keys, self.values = (_widen(t, count, 1) for t in (self.keys, self.values))
        self.position = _widen(self.position, count, 0)
        self.shard = _widen(self.shard, count, 0)
        if self.earlier_shards is not None:
            self.earlier_shards = _widen(self.earlier_shards, count, 0)
        free = self.free_pages()
        new = torch.arange(old + count - 1, old - 1, -1, device=free.device)
        spare = torch.empty(self.num_pages - free.numel() - count, dtype=torch.int64,
                            device=free.device)
        # Older pages lie on top of the stack, so that a sequence's pages tend to be neighbours.
        self._free = torch.cat([new, free, spare])
        self._num_free += count
        self._free_at_least += count


def _widen(pool: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Insert `count` entries before the last one of `dim`."""
    size = pool.shape[dim]
    shape = list(pool.shape)
    shape[dim] = size + count
    wide = pool.new_zeros(shape)
    wide.narrow(dim, 0, size - 1).copy_(pool.narrow(dim, 0, size - 1))
    wide.narrow(dim, size + count - 1, 1).copy_(pool.narrow(dim, size - 1, 1))
    return wide
