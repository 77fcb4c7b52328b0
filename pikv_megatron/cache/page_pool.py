"""Sealed pages of one layer on their owner rank."""

import torch

from pikv_megatron.cache.free_list import FreeList
from pikv_megatron.cache.widen import growth_bytes, narrow, narrow_fields, widen, widen_fields
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.types import KVPages


class PagePool:
    """Pages of S tokens; one more, the null page, takes writes that are to be lost.

    Attributes:
        kv: what the codec stores, the null page last.
        position: [p + 1, S], int32.
        shard: [p + 1], int32, the shard a page belongs to.
        earlier_shards: [p + 1, S], int64 replica masks, or None without replicas.
        score: [p + 1, scores], float32, of a page, or None where retention does not ask for it.
        free: which pages are free.
    """

    def __init__(
        self, codec: PageCodec, page_size: int, has_replicas: bool, num_scores: int,
        device: torch.device,
    ):
        self.free = FreeList(device)
        self.kv: KVPages = codec.allocate(1)
        self.position = torch.full((1, page_size), -1, dtype=torch.int32, device=device)
        self.shard = torch.zeros(1, dtype=torch.int32, device=device)
        self.earlier_shards = (
            torch.zeros(1, page_size, dtype=torch.int64, device=device) if has_replicas else None
        )
        self.score = (
            torch.zeros(1, num_scores, device=device) if num_scores else None
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
        if self.score is not None:
            self.score = widen(self.score, missing, 0)
        return missing

    def compact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give back the memory of free pages; see `FreeList.compact` for what is returned."""
        kept, number = self.free.compact()
        self.kv = narrow_fields(self.kv, kept)
        self.position = narrow(self.position, kept, 0)
        self.shard = narrow(self.shard, kept, 0)
        if self.earlier_shards is not None:
            self.earlier_shards = narrow(self.earlier_shards, kept, 0)
        if self.score is not None:
            self.score = narrow(self.score, kept, 0)
        return kept, number

    def growth_bytes(self, count: int) -> int:
        """What `reserve` would allocate."""
        missing = self.free.missing(count)
        own = growth_bytes(self._by_page(), self.null_page + 1, missing)
        return own + self.free.growth_bytes(missing)

    def metadata(self) -> list[torch.Tensor]:
        """What is kept of pages besides what they store."""
        return [t for t in self._described() if t is not None] + self.free.tensors()

    def tensors(self) -> list[torch.Tensor]:
        return self.kv.tensors + self.metadata()

    def _by_page(self) -> list[torch.Tensor | None]:
        return [*self.kv.tensors, *self._described()]

    def _described(self) -> list[torch.Tensor | None]:
        return [self.position, self.shard, self.earlier_shards, self.score]
