"""The rows of a step that feed one token: all of them are attended to at once.

Legend: n rows of this home rank, W places of a window.
"""

from functools import cached_property
from typing import NamedTuple

import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.owner_reads import OwnerReads
from pikv_megatron.cache.step_rows import RowsByRank, WindowLayout
from pikv_megatron.types import PageList


class SlidingReads(NamedTuple):
    """Of rings in which position p lies at p % W.

    Attributes:
        places: [n], int64, of the new tokens.
        lens: [n, 1], int32, tokens of each ring that are read, those at its first places.
    """

    places: torch.Tensor
    lens: torch.Tensor


class DecodePart:
    """What decoding rows read.

    Args:
        rows_by_rank: the decoding rows of each home rank.
        rank: this rank.
        slots_per_rank: window slots of a rank.
        layout: the windows' layout.
        footprint: what tokens in shards take on the ranks.
        device: where the tensors are needed.

    Attributes:
        counts: rows of each home rank.
        num_rows: n.
        slots: [n], int64, slots in the group.
        window_slots: [n], int64, slots on this rank.
        positions: [n], int64, of the queries.
        window_reads: one page a row, whose pools are to be filled in.
        reads_shards: some row of some rank has tokens in shards.
        reads_far: some row of some rank has tokens on other ranks.
        most_pages: at least the pages that any row filled on any rank.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, slots_per_rank: int, layout: WindowLayout,
        footprint: Footprint, device: torch.device,
    ):
        own = rows_by_rank[rank]
        self.counts = [len(rows) for rows in rows_by_rank]
        self.num_rows = len(own)
        self._rank = rank
        self._slots_by_rank = [[row.sequence.slot for row in rows] for rows in rows_by_rank]
        self._positions = [row.end - 1 for rows in rows_by_rank for row in rows]
        flushed = [row.sequence.flushed for rows in rows_by_rank for row in rows]
        in_shards = max(flushed, default=layout.num_sinks) - layout.num_sinks
        self.reads_shards = in_shards > 0
        self.reads_far = footprint.is_far(in_shards)
        self.most_pages = footprint.most_pages(in_shards)
        fields = [[r.sequence.slot, r.sequence.flushed, r.end] for r in own]
        numbers = torch.tensor(fields, dtype=torch.int64, device=device).view(-1, 3)
        self.slots, flushed, length = numbers.unbind(1)
        self.positions = length - 1
        self.window_slots = self.slots - rank * slots_per_rank
        self._sliding: dict[int, SlidingReads] = {}
        lens = torch.full((self.num_rows, 1), layout.size, dtype=torch.int32, device=device)
        # A row's new token is written before it is attended to.
        mask = layout.live(flushed, length).unsqueeze(1)
        self.window_reads = PageList(None, self.window_slots.unsqueeze(1), lens, mask)

    @property
    def is_anywhere(self) -> bool:
        """Whether any rank has such rows."""
        return any(self.counts)

    def sliding(self, window: int) -> SlidingReads:
        """What rows read where queries see a sliding window: the same in every such layer."""
        if window not in self._sliding:
            lens = (self.positions + 1).clamp(max=window).to(torch.int32).unsqueeze(1)
            self._sliding[window] = SlidingReads(self.positions % window, lens)
        return self._sliding[window]

    @cached_property
    def own_reads(self) -> OwnerReads:
        """All of this rank's rows."""
        key = tuple(self._slots_by_rank[self._rank])
        return OwnerReads(self.slots, self.most_pages, key, positions=self.positions)

    @cached_property
    def all_reads(self) -> OwnerReads:
        """All rows of all ranks, one rank behind the other."""
        key = tuple(slot for slots in self._slots_by_rank for slot in slots)
        numbers = torch.tensor(
            [key, self._positions], dtype=torch.int64, device=self.slots.device
        )
        return OwnerReads(numbers[0], self.most_pages, key, positions=numbers[1])
