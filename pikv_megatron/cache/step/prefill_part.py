"""The rows of a step that feed several tokens: prompts, pieces of prompts and next turns.

Each has its own length, so they are attended to one by one.

Legend: n rows of this home rank, r of all ranks, W places of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.step.step_rows import RowFields, RowsByRank, StepRow, WindowLayout
from pikv_megatron.types import PageList


class PrefillNumbers(NamedTuple):
    """What the device is told of prefill rows.

    Attributes:
        slots: [r], int64, slots in the group of all ranks' rows.
        last_positions: [r], int64, of their last tokens.
        window_slots: [n], int64, slots on this rank of its own rows.
        window_lens: [n, 1], int32, W.
        window_mask: [n, 1, W], bool, the places that hold their past.
    """

    slots: torch.Tensor
    last_positions: torch.Tensor
    window_slots: torch.Tensor
    window_lens: torch.Tensor
    window_mask: torch.Tensor

    @classmethod
    def of(
        cls, by_rank: list[RowFields], rank: int, first_slot: int, layout: WindowLayout
    ) -> "PrefillNumbers":
        """As arrays, of the prefill rows of each rank."""
        own = by_rank[rank]
        return cls(
            np.concatenate([rows.slot for rows in by_rank]),
            np.concatenate([rows.end - 1 for rows in by_rank]),
            own.slot - first_slot,
            np.full((len(own.slot), 1), layout.size, dtype=np.int32),
            layout.live(own.flushed, own.past)[:, None],
        )


@dataclass
class PrefillRow:
    """One row of any home rank.

    Attributes:
        tokens: its tokens among those of its rank's prefill rows.
        past: tokens that were cached before.
        reads: what an owner reads for it; None: nothing of it lies in shards.
        is_far: some of it lies on other ranks.
    """

    tokens: slice
    past: int
    reads: OwnerReads | None
    is_far: bool


class PrefillPart:
    """What prefill rows read.

    Arguments are as of `DecodePart`.

    Attributes:
        numbers: as given; None where no rank has such rows.
        rows: of this rank.
        rows_by_rank: of each home rank.
        lens: tokens of this rank's rows.
        reads_far: some row of some rank has tokens on other ranks.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, num_sinks: int, footprint: Footprint,
        numbers: PrefillNumbers | None,
    ):
        self.numbers = numbers
        self._num_sinks, self._footprint = num_sinks, footprint
        slots = iter(() if numbers is None else numbers.slots.split(1))
        self.rows_by_rank = [self._prefill_rows(rows, slots) for rows in rows_by_rank]
        self.rows = self.rows_by_rank[rank]
        self.lens = [row.count for row in rows_by_rank[rank]]
        self.reads_far = any(row.is_far for rows in self.rows_by_rank for row in rows)

    @property
    def is_anywhere(self) -> bool:
        """Whether any rank has such rows."""
        return any(self.rows_by_rank)

    def window_reads(self, index: int) -> PageList:
        """What row `index` of this rank reads of its window, whose pools are to be filled in."""
        row = slice(index, index + 1)
        own = self.numbers
        return PageList(
            None, own.window_slots[row].unsqueeze(1), own.window_lens[row], own.window_mask[row]
        )

    def last_tokens(self, num_tokens: int) -> list[list[slice]]:
        """The last `num_tokens` tokens of every row, fewer of a shorter one, by home rank."""
        return [
            [slice(max(row.tokens.start, row.tokens.stop - num_tokens), row.tokens.stop)
             for row in rows]
            for rows in self.rows_by_rank
        ]

    def _prefill_rows(
        self, rows: list[StepRow], slots: Iterator[torch.Tensor]
    ) -> list[PrefillRow]:
        found, first = [], 0
        for row, slot in zip(rows, slots):
            tokens = slice(first, first + row.count)
            in_shards = row.sequence.flushed - self._num_sinks
            reads = None
            if in_shards > 0:
                most_pages = self._footprint.most_pages(in_shards)
                reads = OwnerReads(slot, most_pages, (row.sequence.slot,))
            found.append(PrefillRow(tokens, row.past, reads, self._footprint.is_far(in_shards)))
            first = tokens.stop
        return found
