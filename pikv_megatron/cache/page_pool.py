"""Sealed pages of one layer on their owner rank."""

import torch

from pikv_megatron.cache.free_list import FreeList
from pikv_megatron.cache.widen import widen, widen_fields
from pikv_megatron.compression.base import KVCodec
from pikv_megatron.types import KVPages


class PagePool:
    """Pages of S tokens; one more, the null page, takes writes that are to be lost.

    Attributes:
        kv: what the codec stores, the null page last.
        position: [p + 1, S], int32.
        shard: [p + 1], int32, the shard a page belongs to.
        earlier_shards: [p + 1, S], int64 replica masks, or None without replicas.
    """

    def __init__(
        self, codec: KVCodec, num_groups: int, page_size: int, head_dim: int, has_replicas: bool,
        dtype: torch.dtype, device: torch.device,
    ):
        self._free = FreeList(device)
        self.kv: KVPages = codec.allocate(num_groups, 1, page_size, head_dim, dtype, device)
        self.position = torch.full((1, page_size), -1, dtype=torch.int32, device=device)
        self.shard = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.earlier_shards = (
            torch.zeros(1, page_size, dtype=torch.int64, device=device) if has_replicas else None
        )

    @property
    def null_page(self) -> int:
        return self._free.num_pages

    def reserve(self, count: int) -> None:
        """See that `count` pages are free, growing the pool where they are not."""
        missing = self._free.missing(count)
        if not missing:
            return
        self._free.add(missing)
        self.kv = widen_fields(self.kv, missing)
        self.position = widen(self.position, missing, 0)
        self.shard = widen(self.shard, missing, 0)
        if self.earlier_shards is not None:
            self.earlier_shards = widen(self.earlier_shards, missing, 0)

    def allocate(self, is_used: torch.Tensor) -> torch.Tensor:
        """A page for every True of [c], the null page for the rest. Reserved before."""
        return self._free.allocate(is_used)

    def release(self, pages: torch.Tensor) -> None:
        """Give pages [c] back."""
        self._free.release(pages)

    def free_pages(self) -> torch.Tensor:
        return self._free.pages()

    def tensors(self) -> list[torch.Tensor]:
        every = [*self.kv, self.position, self.shard, self.earlier_shards]
        return [t for t in every if t is not None] + self._free.tensors()
