"""What is read of a rank's pages and token buffers, as lists that attention takes.

Legend: n sequences, m columns of a sequence, k pages read, S tokens a page.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.cache.pages.page_table import PageTable
from pikv_megatron.cache.pages.token_buffer import TokenBuffers
from pikv_megatron.cache.placement import Placement
from pikv_megatron.codec.key_angles import KeyAngles
from pikv_megatron.types import KeyTurn, KVPages, KVShape, PageList

Kept = TypeVar("Kept")


class StoreLists:
    """Where nothing is left out, what is read changes with a flush only, and is kept until then.

    Args:
        pool: pages.
        table: which of them a sequence has.
        buffers: of the shards.
        placement: which shards this rank owns.
        kv: tokens as computed.
        num_heads: query heads.
        angles: of keys that are stored before RoPE; None: behind it.
    """

    def __init__(
        self, pool: PagePool, table: PageTable, buffers: TokenBuffers, placement: Placement,
        kv: KVShape, num_heads: int, angles: KeyAngles | None,
    ):
        self._pool, self._table, self._buffers = pool, table, buffers
        self._placement, self._num_heads, self._angles = placement, num_heads, angles
        self._page_size = pool.position.shape[1]
        self._open_pages = KVPages.plain(
            buffers.tensors["keys"], buffers.tensors.get("values"), kv.value_width
        )
        self._made: dict[tuple, object] = {}

    def clear(self) -> None:
        """Pages or buffers changed."""
        self._made.clear()

    def sealed(self, reads: OwnerReads, num_columns: int) -> PageList:
        """Pages that are read, of at least so many columns as any sequence has."""
        kept = None if reads.key is None else (num_columns, reads.key)
        return self._kept(
            "sealed", kept if reads.is_everything else None,
            lambda: self._sealed(reads, num_columns),
        )

    def stored(self, reads: OwnerReads, sealed: PageList) -> list[PageList]:
        """The same as they are stored: see `PagePool.lists`."""
        kept = None if reads.key is None else (sealed.table.shape[1], reads.key)
        return self._kept(
            "stored", kept if reads.is_everything else None, lambda: self._pool.lists(sealed)
        )

    def opened(self, reads: OwnerReads) -> PageList:
        """Token buffers that are read."""
        return self._kept(
            "open", reads.key if reads.visited is None else None, lambda: self._opened(reads)
        )

    def drawn(self, reads: OwnerReads, num_columns: int) -> list[PageList]:
        """Pages that stand for others."""
        if reads.drawn is None:
            return []
        pages, is_read = self._pages(reads._replace(columns=reads.drawn), num_columns)
        weight = reads.log_weight.view(-1, 1, 1).expand(-1, 1, self._num_heads)
        lens, turn = is_read.int() * self._page_size, self._turn(pages)
        return [PageList(self._pool.kv, pages, lens, None, weight, turn)]

    def ahead(self, reads: OwnerReads, num_columns: int) -> torch.Tensor:
        """Numbers [c] of the pages that the next step may read."""
        pages, is_listed = self._pages(reads._replace(columns=reads.ahead), num_columns)
        return pages[is_listed]

    def _sealed(self, reads: OwnerReads, num_columns: int) -> PageList:
        pages, is_read = self._pages(reads, num_columns)
        mask = None
        if self._pool.earlier_shards is not None:
            mask = _is_first_replica(self._pool.earlier_shards[pages], reads.visited)
        lens, turn = is_read.int() * self._page_size, self._turn(pages)
        return PageList(self._pool.kv, pages, lens, mask, turn=turn)

    def _opened(self, reads: OwnerReads) -> PageList:
        slots, visited, shards = reads.slots, reads.visited, self._placement.shards_per_rank
        table = slots.unsqueeze(1) * shards + torch.arange(shards, device=slots.device)
        lens = self._buffers.lens(table)
        if visited is not None:
            lens = lens * visited[:, self._placement.rank :: self._placement.num_ranks]
        mask = None
        if self._pool.earlier_shards is not None:
            mask = _is_first_replica(self._buffers.tensors["earlier"][table], visited)
        return PageList(self._open_pages, table, lens.int(), mask)

    def _pages(
        self, reads: OwnerReads, num_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page numbers [n, k], those that are read first and any behind them, and which of them are
        read."""
        pages = self._kept(
            "pages", None if reads.key is None else (num_columns, reads.key),
            lambda: self._table.page[reads.slots, :num_columns],
        )
        if reads.columns is not None:
            return pages.gather(1, reads.columns.clamp(min=0)), reads.columns >= 0
        is_read = self._table.is_page(reads.slots, num_columns)
        if reads.visited is None:
            return pages, is_read
        shard = self._pool.shard[torch.where(is_read, pages, self._pool.null_page)].long()
        is_read &= reads.visited.gather(1, shard)
        order = is_read.int().argsort(dim=1, descending=True, stable=True)
        return pages.gather(1, order), is_read.gather(1, order)

    def _turn(self, pages: torch.Tensor) -> KeyTurn | None:
        """What turns the keys of listed pages [n, m]."""
        return None if self._angles is None else self._angles.turn(self._pool.position, pages)

    def _kept(self, name: str, key: tuple | None, make: Callable[[], Kept]) -> Kept:
        """What was made for a key since the last flush, or is made now."""
        if key is None:
            return make()
        if (name, key) not in self._made:
            self._made[name, key] = make()
        return self._made[name, key]


def _is_first_replica(earlier: torch.Tensor, visited: torch.Tensor | None) -> torch.Tensor:
    """True where no visited shard holds a replica of lower order: earlier [n, m, S]."""
    if visited is not None:
        bits = (visited.long() << torch.arange(visited.shape[1], device=visited.device)).sum(dim=1)
        earlier = earlier & bits.view(-1, 1, 1)
    return earlier == 0
