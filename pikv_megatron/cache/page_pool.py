"""Sealed pages of one layer on their owner rank."""

import torch

from pikv_megatron.cache.free_list import FreeList
from pikv_megatron.cache.widen import growth_bytes, widen, widen_fields
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.types import KVPages


class PagePool:
    """Pages of S tokens; one more, the null page, takes writes that are to be lost.

    Attributes:
        kv: what the codec stores, the null page last.
        position: [p + 1, S], int32.
        shard: [p + 1], int32, the shard a page belongs to.
        earlier_shards: [p + 1, S], int64 replica masks, or None without replicas.
        free: which pages are free.
    """

    def __init__(
        self, codec: PageCodec, page_size: int, has_replicas: bool, device: torch.device
    ):
        self.free = FreeList(device)
        self.kv: KVPages = codec.allocate(1)
        self.position = torch.full((1, page_size), -1, dtype=torch.int32, device=device)
        self.shard = torch.zeros(1, dtype=torch.int32, device=device)
        self.earlier_shards = (
            torch.zeros(1, page_size, dtype=torch.int64, device=device) if has_replicas else None
        )

    @property
    def null_page(self) -> int:
        return self.free.num_pages

    def reserve(self, count: int) -> int:
        """See that `count` pages are free; how many the pool grew by."""
        missing = self.free.missing(count)
        if not missing:
            return 0
        self.free.add(missing)
        self.kv = widen_fields(self.kv, missing)
        self.position = widen(self.position, missing, 0)
        self.shard = widen(self.shard, missing, 0)
        if self.earlier_shards is not None:
            self.earlier_shards = widen(self.earlier_shards, missing, 0)
        return missing

    def growth_bytes(self, count: int) -> int:
        """What `reserve` would allocate."""
        missing = self.free.missing(count)
        own = growth_bytes(self._by_page(), self.null_page + 1, missing)
        return own + self.free.growth_bytes(missing)

    def metadata(self) -> list[torch.Tensor]:
        """What is kept of pages besides what they store."""
        own = [self.position, self.shard, self.earlier_shards, *self.free.tensors()]
        return [t for t in own if t is not None]

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in self.kv if t is not None] + self.metadata()

    def _by_page(self) -> list[torch.Tensor | None]:
        stored = [t for t in self.kv if isinstance(t, torch.Tensor)]
        return [*stored, self.position, self.shard, self.earlier_shards]
