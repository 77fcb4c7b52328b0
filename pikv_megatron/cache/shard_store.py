"""The shards of one layer that a rank owns: token buffers that are sealed into pages.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, hn head width, S tokens a page,
m pages a sequence, t tokens of a block. A *group* is one (slot, local shard), with a token buffer.
"""

from typing import NamedTuple

import torch

from pikv_megatron.cache.ledger import Admission, PageLedger
from pikv_megatron.cache.page_pool import PagePool
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.token_buffer import TokenBuffers
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.compression.base import KVCodec
from pikv_megatron.scheduler.base import RetentionPolicy
from pikv_megatron.types import AttentionState, KVPages, PageList, PageStats

DROPPED = -1  # in a page table: the column had a page once


class OwnerReads(NamedTuple):
    """What queries that came to an owner read of its part.

    Attributes:
        slots: [n], int64, their sequences.
        num_columns: m, at least the pages of any of them here.
        key: the slots, where the host knows them.
        visited: [n], int64, bit masks of the visited shards; None for all of them.
        selected: [n, m], bool, pages to read of those; None for all of them.
    """

    slots: torch.Tensor
    num_columns: int
    key: tuple[int, ...] | None = None
    visited: torch.Tensor | None = None
    selected: torch.Tensor | None = None


class ShardStore:
    """Token buffers and pages of every sequence of the expert-parallel group, one layer.

    Args:
        placement: which shards this rank owns.
        num_slots: sequence slots of the whole group.
        max_pages: most pages that one sequence can have on this rank.
        page_size: S.
        num_groups: ng.
        head_dim: hn.
        has_replicas: whether tokens can be stored in more than one shard.
        codec: how sealed pages are stored.
        retention: which of them stay.
    """

    def __init__(
        self, placement: Placement, num_slots: int, max_pages: int, page_size: int,
        num_groups: int, head_dim: int, has_replicas: bool, codec: KVCodec,
        retention: RetentionPolicy, dtype: torch.dtype, device: torch.device,
    ):
        self.placement = placement
        self.page_size = page_size
        self.num_slots = num_slots
        self._shards = placement.shards_per_rank
        self._codec = codec
        self._retention = retention
        self.pool = PagePool(codec, num_groups, page_size, head_dim, has_replicas, dtype, device)
        # The row behind the last slot is read by padding and never written.
        self.ledger = PageLedger(num_slots + 1, self._shards, page_size, device)
        metadata = {"position": torch.int32} | ({"earlier": torch.int64} if has_replicas else {})
        heads = dict.fromkeys(("keys", "values"), (num_groups, head_dim))
        self.buffers = TokenBuffers(self.ledger, heads, metadata, dtype, device)
        self.page_table = torch.zeros(
            num_slots + 1, max_pages + 1, dtype=torch.int64, device=device
        )
        # What is read where nothing is left out changes with a flush only.
        self._lists: dict[tuple[int, ...], list[PageList]] = {}

    def reserve(self, num_pages: int) -> None:
        """See that `num_pages` pages are free before any token is computed."""
        self._lists.clear()
        self.pool.reserve(num_pages)

    def insert(self, block: TokenBlock) -> None:
        """Append tokens to their buffers, sealing every buffer that fills up: O(t)."""
        if block.slot.numel() == 0:
            return
        self._lists.clear()
        tokens = {"keys": block.keys, "values": block.values, "position": block.position}
        if self.pool.earlier_shards is not None:
            tokens["earlier"] = block.earlier_shards
        admission, pages = self.buffers.insert(self._group(block), tokens)
        if pages:
            self._seal(admission, pages)
            keep = self._retention.keep(self._stats())
            if keep is not None:
                self._drop(~keep)

    def attend(
        self, query: torch.Tensor, reads: OwnerReads, softmax_scale: float, near: list[PageList],
    ) -> AttentionState:
        """Attention of query [n, sq, np, hn] over this rank's part of n sequences.

        Args:
            reads: which sequences, and which part of them.
            near: lists that are attended to besides, in the same softmax.
        """
        sealed, opened = self._list(reads)
        return self._codec.attend(query, sealed, [opened, *near], softmax_scale)

    def release(self, slot: int) -> None:
        """Give back every page and buffer of a sequence."""
        self._lists.clear()
        self.pool.release(self._pages(slot))
        self.ledger.clear(slot)

    def tensors(self) -> list[torch.Tensor]:
        own = [*self.buffers.tensors.values(), self.page_table]
        return own + self.ledger.tensors() + self.pool.tensors()

    def positions(self, slot: int) -> torch.Tensor:
        """Positions of the tokens stored for a sequence, in no order; replicas each count."""
        groups = torch.arange(slot * self._shards, (slot + 1) * self._shards)
        position = self.buffers.tensors["position"]
        lens = self.buffers.lens(groups).tolist()
        open_parts = [position[g, :length] for g, length in zip(groups.tolist(), lens)]
        return torch.cat([self.pool.position[self._pages(slot)].reshape(-1), *open_parts])

    def check_integrity(self) -> None:
        """Every page is free or in exactly one table, and the counts agree."""
        used = [self._pages(slot) for slot in range(self.num_slots)]
        every = torch.cat([*used, self.pool.free_pages()]).sort().values
        assert torch.equal(every, torch.arange(self.pool.null_page, device=every.device)), (
            "pages lost or held twice"
        )
        full = self.ledger.num_tokens[:-1] // self.page_size
        assert torch.equal(full.view(self.num_slots + 1, -1).sum(1), self.ledger.num_pages), (
            "page counts disagree with token counts"
        )

    def holds(self, slot: int) -> bool:
        """Whether any token of a sequence is stored."""
        first = slot * self._shards
        return bool(self.ledger.num_tokens[first : first + self._shards].any())

    def _pages(self, slot: int) -> torch.Tensor:
        pages = self.page_table[slot, : int(self.ledger.num_pages[slot])]
        return pages[pages != DROPPED]

    def _group(self, block: TokenBlock) -> torch.Tensor:
        mine = (block.slot >= 0) & (self.placement.owner(block.shard) == self.placement.rank)
        group = block.slot * self._shards + self.placement.local_shard(block.shard)
        return torch.where(mine, group, self.ledger.padding_group)

    def _seal(self, admission: Admission, full: dict[str, torch.Tensor]) -> None:
        """Store the pages that became full, and list them."""
        self.pool.reserve(admission.is_page.numel())
        pages = self.pool.allocate(admission.is_page)
        column = torch.where(
            admission.is_page, admission.page_column, self.page_table.shape[1] - 1
        )
        self.page_table[admission.page_row, column] = pages
        local = admission.page_group % self._shards
        shard = local * self.placement.num_ranks + self.placement.rank
        self.pool.shard[pages] = shard.to(torch.int32)
        self.pool.position[pages] = full["position"]
        if self.pool.earlier_shards is not None:
            self.pool.earlier_shards[pages] = full["earlier"]
        self._codec.seal(full["keys"], full["values"], self.pool.kv, pages)

    def _listed(self, table: torch.Tensor, num_pages: torch.Tensor) -> torch.Tensor:
        """[..., m]: the columns that hold a page."""
        is_listed = torch.arange(table.shape[-1], device=table.device) < num_pages.unsqueeze(-1)
        return is_listed & (table != DROPPED)

    def _stats(self) -> PageStats:
        table = self.page_table[:-1, :-1]
        is_page = self._listed(table, self.ledger.num_pages[:-1])
        return PageStats(table, is_page, self.pool.position, self.pool.shard)

    def _drop(self, unwanted: torch.Tensor) -> None:
        """Give pages [slots, m] back; their columns stay, so that later ones keep their place."""
        table = self.page_table[:-1, :-1]
        unwanted = unwanted & self._listed(table, self.ledger.num_pages[:-1])
        self.pool.release(table[unwanted])
        table[unwanted] = DROPPED

    def _list(self, reads: OwnerReads) -> list[PageList]:
        if reads.key is None or reads.visited is not None or reads.selected is not None:
            return [self._sealed(reads), self._open(reads)]
        if reads.key not in self._lists:
            self._lists[reads.key] = [self._sealed(reads), self._open(reads)]
        return self._lists[reads.key]

    def _sealed(self, reads: OwnerReads) -> PageList:
        slots, visited, selected = reads.slots, reads.visited, reads.selected
        table = self.page_table[slots, : reads.num_columns]
        is_read = self._listed(table, self.ledger.num_pages[slots])
        table = torch.where(is_read, table, self.pool.null_page)
        if selected is not None:
            is_read = is_read & selected
        if visited is not None:
            is_read = is_read & _is_visited(visited.unsqueeze(1), self.pool.shard[table].long())
        mask = None
        if self.pool.earlier_shards is not None:
            mask = _is_first_replica(self.pool.earlier_shards[table], visited)
        return PageList(self.pool.kv, table, is_read.int() * self.page_size, mask, notes={})

    def _open(self, reads: OwnerReads) -> PageList:
        slots, visited = reads.slots, reads.visited
        local = torch.arange(self._shards, device=slots.device)
        table = slots.unsqueeze(1) * self._shards + local
        lens = self.buffers.lens(table)
        tensors = self.buffers.tensors
        if visited is not None:
            shard = local * self.placement.num_ranks + self.placement.rank
            lens = lens * _is_visited(visited.unsqueeze(1), shard)
        mask = None
        if self.pool.earlier_shards is not None:
            mask = _is_first_replica(tensors["earlier"][table], visited)
        pages = KVPages(tensors["keys"], tensors["values"])
        return PageList(pages, table, lens.int(), mask, notes={})


def _is_first_replica(earlier: torch.Tensor, visited: torch.Tensor | None) -> torch.Tensor:
    """True where no visited shard holds a replica of lower order: earlier [n, m, S]."""
    return (earlier if visited is None else earlier & visited.view(-1, 1, 1)) == 0


def _is_visited(visited: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    return ((visited >> shard.clamp(min=0)) & 1).bool() & (shard >= 0)
