"""Sketches of the pages of one layer's sequences, kept on their home rank wherever the pages lie.

The home rank sends every token to its shard, so it can count along with the owners: it knows which
flush seals a page, and makes the page's sketch itself, without a message from the owner. That costs
a copy of the keys in its own sequences' token buffers.

Legend: ng KV heads, hn head width, S tokens a page, G ranks, n sequences, m pages of one on a rank.
"""

import torch

from pikv_megatron.cache.free_list import FreeList
from pikv_megatron.cache.ledger import PageLedger
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.token_buffer import TokenBuffers
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.cache.widen import widen, widen_fields
from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import Directory


class PageDirectory:
    """One row for each (sequence of this rank, owner), which lists pages as the owner does.

    Args:
        placement: which rank owns which shard.
        num_slots: sequences of this home rank.
        max_pages: most pages that one sequence can have on one rank.
        page_size: S.
        num_groups: ng.
        head_dim: hn.
        sketcher: what is remembered of a page.
    """

    def __init__(
        self, placement: Placement, num_slots: int, max_pages: int, page_size: int,
        num_groups: int, head_dim: int, sketcher: PageSketcher, dtype: torch.dtype,
        device: torch.device,
    ):
        self._placement = placement
        self._num_slots = num_slots
        self._sketcher = sketcher
        rows = num_slots * placement.num_ranks
        self._ledger = PageLedger(rows, placement.shards_per_rank, page_size, device)
        heads = {"keys": (num_groups, head_dim)}
        self._buffers = TokenBuffers(self._ledger, heads, {}, dtype, device)
        self._table = torch.zeros(rows, max_pages + 1, dtype=torch.int64, device=device)
        self._free = FreeList(device)
        # The last entry takes writes that are to be lost.
        self._sketch = sketcher.allocate(num_groups, 1, page_size, head_dim, dtype, device)
        self._shard = torch.full((1,), -1, dtype=torch.int64, device=device)

    def reserve(self, num_pages: int) -> None:
        """See that `num_pages` more pages can be noted."""
        missing = self._free.missing(num_pages)
        if missing:
            self._free.add(missing)
            self._sketch = widen_fields(self._sketch, missing)
            self._shard = widen(self._shard, missing, 0)

    def note(self, block: TokenBlock) -> None:
        """Take down tokens that leave for their shards; `slot` counts over the whole group."""
        admission, pages = self._buffers.insert(self._group(block), {"keys": block.keys})
        if not pages:
            return
        self.reserve(admission.is_page.numel())
        place = self._free.allocate(admission.is_page)
        column = torch.where(admission.is_page, admission.page_column, self._table.shape[1] - 1)
        self._table[admission.page_row, column] = place
        self._sketcher.write(pages["keys"], self._sketch, place)
        owner = admission.page_row % self._placement.num_ranks
        local = admission.page_group % self._placement.shards_per_rank
        self._shard[place] = torch.where(
            admission.is_page, local * self._placement.num_ranks + owner, -1
        )

    def look_up(self, slots: torch.Tensor, num_columns: int) -> Directory:
        """The pages of the sequences `slots` [n] of this rank; m is `num_columns`."""
        ranks = self._placement.num_ranks
        rows = slots.unsqueeze(1) * ranks + torch.arange(ranks, device=slots.device)
        column = torch.arange(num_columns, device=slots.device)
        is_page = column < self._ledger.num_pages[rows].unsqueeze(2)
        table = torch.where(is_page, self._table[rows, :num_columns], self._free.num_pages)
        shard = torch.where(is_page, self._shard[table], -1)
        return Directory(self._sketch, table, is_page, shard)

    def release(self, slot: int) -> None:
        """Forget a sequence of this rank."""
        for row in self._rows(slot):
            self._free.release(self._pages(row))
            self._ledger.clear(row)

    def tensors(self) -> list[torch.Tensor]:
        own = [*self._buffers.tensors.values(), *self._ledger.tensors(), *self._free.tensors()]
        sketch = [t for t in self._sketch if isinstance(t, torch.Tensor)]
        return own + sketch + [self._table, self._shard]

    def check_integrity(self) -> None:
        """Every entry is free or belongs to exactly one row."""
        rows = range(self._num_slots * self._placement.num_ranks)
        used = [self._pages(row) for row in rows]
        every = torch.cat([*used, self._free.pages()]).sort().values
        assert torch.equal(every, torch.arange(self._free.num_pages, device=every.device)), (
            "directory entries lost or held twice"
        )

    def _rows(self, slot: int) -> range:
        ranks = self._placement.num_ranks
        return range(slot * ranks, (slot + 1) * ranks)

    def _pages(self, row: int) -> torch.Tensor:
        return self._table[row, : int(self._ledger.num_pages[row])]

    def _group(self, block: TokenBlock) -> torch.Tensor:
        placement = self._placement
        slot = block.slot - placement.rank * self._num_slots
        row = slot * placement.num_ranks + placement.owner(block.shard)
        group = row * placement.shards_per_rank + placement.local_shard(block.shard)
        return torch.where(block.slot >= 0, group, self._ledger.padding_group)
