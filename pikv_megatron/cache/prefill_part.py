"""The rows of a step that feed several tokens: prompts, pieces of prompts and next turns.

Each has its own length, so they are attended to one by one.
"""

from dataclasses import dataclass

import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.owner_reads import OwnerReads
from pikv_megatron.cache.step_rows import RowsByRank, StepRow, WindowLayout
from pikv_megatron.types import PageList


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
        rows: of this rank.
        rows_by_rank: of each home rank.
        lens: tokens of this rank's rows.
        reads_far: some row of some rank has tokens on other ranks.
        slots_by_rank: slots in the group of each home rank's rows.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, slots_per_rank: int, layout: WindowLayout,
        footprint: Footprint, device: torch.device,
    ):
        self._layout, self._footprint, self._device = layout, footprint, device
        self._first_slot = rank * slots_per_rank
        self._step_rows = rows_by_rank[rank]
        self.rows_by_rank = [self._prefill_rows(rows) for rows in rows_by_rank]
        self.rows = self.rows_by_rank[rank]
        self.lens = [row.count for row in rows_by_rank[rank]]
        self.slots_by_rank = [[row.sequence.slot for row in rows] for rows in rows_by_rank]
        self.reads_far = any(row.is_far for rows in self.rows_by_rank for row in rows)

    @property
    def is_anywhere(self) -> bool:
        """Whether any rank has such rows."""
        return any(self.rows_by_rank)

    def window_reads(self, index: int) -> PageList:
        """What row `index` of this rank reads of its window, whose pools are to be filled in."""
        row = self._step_rows[index]
        numbers = [row.sequence.slot - self._first_slot, row.sequence.flushed, row.past]
        slot, flushed, length = torch.tensor(numbers, device=self._device).unsqueeze(1).unbind(0)
        lens = torch.full((1, 1), self._layout.size, dtype=torch.int32, device=self._device)
        mask = self._layout.live(flushed, length).unsqueeze(1)
        return PageList(None, slot.unsqueeze(1), lens, mask)

    def last_tokens(self, num_tokens: int) -> list[list[slice]]:
        """The last `num_tokens` tokens of every row, fewer of a shorter one, by home rank."""
        return [
            [slice(max(row.tokens.start, row.tokens.stop - num_tokens), row.tokens.stop)
             for row in rows]
            for rows in self.rows_by_rank
        ]

    def _prefill_rows(self, rows: list[StepRow]) -> list[PrefillRow]:
        found, first = [], 0
        for row in rows:
            tokens = slice(first, first + row.count)
            in_shards = row.sequence.flushed - self._layout.num_sinks
            reads = self._reads(row.sequence.slot, in_shards)
            found.append(PrefillRow(tokens, row.past, reads, self._footprint.is_far(in_shards)))
            first = tokens.stop
        return found

    def _reads(self, slot: int, in_shards: int) -> OwnerReads | None:
        if in_shards <= 0:
            return None
        slots = torch.tensor([slot], dtype=torch.int64, device=self._device)
        return OwnerReads(slots, self._footprint.most_pages(in_shards), (slot,))
