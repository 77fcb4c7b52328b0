"""The rows of a step that feed one token: all of them are attended to at once.

Legend: n rows of this home rank, r of all ranks, W places of a window.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.step.step_rows import RowFields, RowsByRank, WindowLayout
from pikv_megatron.types import PageList


class DecodeNumbers(NamedTuple):
    """What the device is told of decoding rows.

    Attributes:
        slots: [n], int64, slots in the group.
        window_slots: [n], int64, slots on this rank.
        positions: [n], int64, of the new tokens.
        places: [n], int64, where the windows hold them.
        window_lens: [n, 1], int32, W.
        window_mask: [n, 1, W], bool, the places that are read, the new token's among them.
        all_slots: [r], int64.
        all_positions: [r], int64.
    """

    slots: torch.Tensor
    window_slots: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    window_lens: torch.Tensor
    window_mask: torch.Tensor
    all_slots: torch.Tensor
    all_positions: torch.Tensor

    @classmethod
    def of(
        cls, by_rank: list[RowFields], rank: int, first_slot: int, layout: WindowLayout
    ) -> "DecodeNumbers":
        """As arrays, of the decoding rows of each rank."""
        own, positions = by_rank[rank], by_rank[rank].past
        return cls(
            own.slot, own.slot - first_slot, positions, layout.place(positions),
            np.full((len(positions), 1), layout.size, dtype=np.int32),
            layout.live(own.flushed, own.end)[:, None],
            np.concatenate([rows.slot for rows in by_rank]),
            np.concatenate([rows.past for rows in by_rank]),
        )


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
        num_sinks: tokens that stay in a window for good.
        footprint: what tokens in shards take on the ranks.
        numbers: of these rows, on the device.

    Attributes:
        numbers: as given.
        counts: rows of each home rank.
        num_rows: n.
        reads_shards: some row of some rank has tokens in shards.
        reads_far: some row of some rank has tokens on other ranks.
        most_pages: at least the pages that any row filled on any rank.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, num_sinks: int, footprint: Footprint,
        numbers: DecodeNumbers,
    ):
        self.numbers = numbers
        self.counts = [len(rows) for rows in rows_by_rank]
        self.num_rows = self.counts[rank]
        self._rank = rank
        flushed = [row.sequence.flushed for rows in rows_by_rank for row in rows]
        in_shards = max(flushed, default=num_sinks) - num_sinks
        self.reads_shards = in_shards > 0
        self.reads_far = footprint.is_far(in_shards)
        self.most_pages = footprint.most_pages(in_shards)
        self._keys = [tuple(row.sequence.slot for row in rows) for rows in rows_by_rank]
        self._sliding: dict[int, SlidingReads] = {}

    def fix(self, most_pages: int) -> None:
        """Let every row read up to so many pages, and no list of them be kept for later steps."""
        self.most_pages, self._keys = most_pages, None

    def forget(self) -> None:
        """The numbers have changed."""
        self._sliding.clear()

    @property
    def is_anywhere(self) -> bool:
        """Whether any rank has such rows."""
        return any(self.counts)

    @cached_property
    def window_reads(self) -> PageList:
        """One page a row, whose pools are to be filled in."""
        own = self.numbers
        return PageList(None, own.window_slots.unsqueeze(1), own.window_lens, own.window_mask)

    def sliding(self, window: int) -> SlidingReads:
        """What rows read where queries see a sliding window: the same in every such layer."""
        if window not in self._sliding:
            positions = self.numbers.positions
            lens = (positions + 1).clamp(max=window).to(torch.int32).unsqueeze(1)
            self._sliding[window] = SlidingReads(positions % window, lens)
        return self._sliding[window]

    @cached_property
    def own_reads(self) -> OwnerReads:
        """All of this rank's rows."""
        key, own = self._keys and self._keys[self._rank], self.numbers
        return OwnerReads(own.slots, self.most_pages, key, positions=own.positions)

    @cached_property
    def all_reads(self) -> OwnerReads:
        """All rows of all ranks, one rank behind the other."""
        key, every = self._keys and sum(self._keys, ()), self.numbers
        return OwnerReads(
            every.all_slots, self.most_pages, key, positions=every.all_positions
        )
