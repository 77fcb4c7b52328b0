"""What one forward pass does with the cache: computed once on the host, used by every layer.

Legend: n sequences of this home rank in the step, sq new tokens (padded), W places of a window.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Callable, Sequence

import torch

from pikv_megatron.cache.shard_store import OwnerReads
from pikv_megatron.types import PageList


@dataclass
class CachedSequence:
    """One live sequence. Every rank of the expert-parallel group keeps all of them.

    Attributes:
        slot: its slot in the group, home rank * slots a rank + slot on the home rank.
        length: tokens in the cache.
        flushed: tokens [num_sinks, flushed) lie in shards.
    """

    slot: int
    flushed: int
    length: int = 0


@dataclass(frozen=True)
class WindowLayout:
    """Places of a stream window: sinks first, then a ring of `window` + `flush_interval`."""

    num_sinks: int
    window: int
    flush_interval: int

    @property
    def ring(self) -> int:
        return self.window + self.flush_interval

    @property
    def size(self) -> int:
        return self.num_sinks + self.ring

    def place_of(self, position: int) -> int:
        """Where a window holds a position."""
        if position < self.num_sinks:
            return position
        return self.num_sinks + (position - self.num_sinks) % self.ring

    def place(self, position: torch.Tensor) -> torch.Tensor:
        """`place_of` for many."""
        ring = self.num_sinks + (position - self.num_sinks) % self.ring
        return torch.where(position < self.num_sinks, position, ring)


@dataclass
class StepRow:
    """A sequence's part in a step: `count` new tokens after `past` cached ones."""

    sequence: CachedSequence
    count: int
    past: int = field(init=False)

    def __post_init__(self):
        self.past = self.sequence.length


@dataclass
class FlushPlan:
    """Which tokens leave the windows of this home rank, and how many leave each rank's.

    Attributes:
        window_places: [a], flat places (slots x W) of tokens that lie in the window.
        chunk_source: [c], flat places (n x sq) of tokens of this step.
        slot: [a + c], sequence slot in the group, window tokens first.
        position: [a + c].
        count_by_rank: tokens that leave each rank.
    """

    window_places: torch.Tensor
    chunk_source: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    count_by_rank: list[int]


class StepPlan:
    """Built on every rank from the same global list of rows.

    Args:
        rows_by_rank: the rows of each home rank, in the order of the batch.
        rank: this rank.
        slots_per_rank: window slots of a rank.
        layout: the windows' layout.
        most_pages: the most pages on one rank of a sequence with so many tokens in shards.
        device: where the tensors are needed.

    Attributes:
        seq_len: sq, the largest count of any row on any rank.
        slots: [n], int64, slots in the group.
        window_slots: [n, 1], int64, slots on this rank.
        slots_by_rank: slots in the group of each rank's rows.
        positions: [sq, n], int64.
        window_mask: [n, W], bool, tokens of the window that were cached before attention.
        is_prefill: no row of this rank has cached tokens, so the chunk is all there is.
        reads_shards: some row of some rank has tokens in shards.
        num_columns: at least the pages that any row has on any rank.
        write_places: [w], flat places of the new tokens that stay in the window.
        write_slots: [w], the same as a window slot of this rank,
        write_offsets: [w], and a place in that window.
        write_source: [w], where they come from in the flat chunk (n x sq).
        flush: what leaves the windows, None where nothing leaves any rank.
    """

    def __init__(
        self, rows_by_rank: Sequence[Sequence[StepRow]], rank: int, slots_per_rank: int,
        layout: WindowLayout, most_pages: Callable[[int], int], device: torch.device,
    ):
        self.rows = list(rows_by_rank[rank])
        self.device = device
        self.layout = layout
        self._slots_per_rank = slots_per_rank
        self._rank = rank
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first_slot = rank * slots_per_rank
        every = [row for rows in rows_by_rank for row in rows]
        self.num_rows = len(self.rows)
        self.max_rows = max((len(rows) for rows in rows_by_rank), default=0)
        self.seq_len = max((row.count for row in every), default=0)
        self.slots_by_rank = [[row.sequence.slot for row in rows] for rows in rows_by_rank]
        self.slots = self._tensor(self.slots_by_rank[rank])
        self.window_slots = (self.slots - self._first_slot).unsqueeze(1)
        past = self._tensor([row.past for row in self.rows])
        self.positions = torch.arange(self.seq_len, device=device).unsqueeze(1) + past
        self.is_prefill = self.seq_len > 1 and all(row.past == 0 for row in self.rows)
        self.is_decode = self.seq_len == 1
        in_shards = max((row.sequence.flushed - layout.num_sinks for row in every), default=0)
        self.reads_shards = in_shards > 0
        self.num_columns = most_pages(in_shards)
        self._plan_flush(rows_by_rank)
        self._plan_window(past)

    @cached_property
    def own_reads(self) -> OwnerReads:
        """All of this rank's rows."""
        return OwnerReads(self.slots, self.num_columns, tuple(self.slots_by_rank[self._rank]))

    @cached_property
    def all_reads(self) -> OwnerReads:
        """All of every rank's rows, one rank behind the other."""
        return self._reads([slot for slots in self.slots_by_rank for slot in slots])

    @cached_property
    def padded_reads(self) -> OwnerReads:
        """[ranks * max_rows]: the same, each rank padded with the slot behind the last."""
        none = self._slots_per_rank * len(self.slots_by_rank)
        padded = [slots + [none] * (self.max_rows - len(slots)) for slots in self.slots_by_rank]
        return self._reads([slot for slots in padded for slot in slots])

    @cached_property
    def window_reads(self) -> PageList:
        """What is read of a window whose pools are to be filled in: one page a slot."""
        lens = torch.full_like(self.window_slots, self.layout.size, dtype=torch.int32)
        mask = self.window_mask.unsqueeze(1)
        return PageList(None, self.window_slots, lens, mask, notes={})

    def rotary_rows(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Rotary angles of this step: the same for queries and keys, and in every layer.

        Args:
            table: [positions, 1, 1, hn]; the model gives all its layers the same one.
            num_rows: b, rows of the batch, the padding behind the real ones included.

        Returns:
            [sq, b, 1, hn], 0 for padding.
        """
        if self._rotary is None or self._rotary[0] is not table:
            positions = self.positions.clamp(max=table.shape[0] - 1)  # of padding
            rows = table[positions, 0]
            padding = rows.new_zeros(rows.shape[0], num_rows - rows.shape[1], *rows.shape[2:])
            self._rotary = table, torch.cat([rows, padding], dim=1)
        return self._rotary[1]

    def finish(self, rows_by_rank: Sequence[Sequence[StepRow]]) -> None:
        """Move every sequence on, after the last layer."""
        for row in (row for rows in rows_by_rank for row in rows):
            row.sequence.length = row.past + row.count
            row.sequence.flushed = self._flushed_after(row)

    def _flushed_after(self, row: StepRow) -> int:
        if not self._flushes:
            return row.sequence.flushed
        return max(row.sequence.flushed, row.past + row.count - self.layout.window)

    def _plan_flush(self, rows_by_rank) -> None:
        layout = self.layout
        every = [row for rows in rows_by_rank for row in rows]
        self._flushes = self.seq_len > 1 or any(
            row.past + row.count - row.sequence.flushed >= layout.ring for row in every
        )
        counts = [
            sum(self._flushed_after(row) - row.sequence.flushed for row in rows)
            for rows in rows_by_rank
        ]
        self.flush = self._flush_plan(counts) if any(counts) else None

    def _flush_plan(self, counts: list[int]) -> FlushPlan:
        window, chunk = _Tokens(), _Tokens()
        for index, row in enumerate(self.rows):
            # In a decode step the new token is written to the window before anything leaves it.
            split = row.past + row.count if self.is_decode else row.past
            first, last = row.sequence.flushed, self._flushed_after(row)
            window.add(index, row.sequence.slot, first, min(last, split))
            chunk.add(index, row.sequence.slot, max(first, split), last, row.past)
        places = self._places(window.slot.tensor(), window.position.tensor())
        source = chunk.row.tensor() * self.seq_len + chunk.offset.tensor()
        return FlushPlan(
            window_places=places.to(self.device),
            chunk_source=source.to(self.device),
            slot=torch.cat([window.slot.tensor(), chunk.slot.tensor()]).to(self.device),
            position=torch.cat([window.position.tensor(), chunk.position.tensor()]).to(self.device),
            count_by_rank=counts,
        )

    def _plan_window(self, past: torch.Tensor) -> None:
        if self.is_decode:
            self._write_one_each()
        else:
            self._write_what_stays()
        flushed = self._tensor([row.sequence.flushed for row in self.rows])
        self.window_mask = self._live(flushed, past + 1 if self.is_decode else past)

    def _write_one_each(self) -> None:
        """A decode step's tokens, one a row, all stay."""
        places = [self.layout.place_of(row.past) for row in self.rows]
        self.write_offsets = self._tensor(places)
        self.write_slots = self.window_slots[:, 0]
        self.write_places = self.write_slots * self.layout.size + self.write_offsets
        self.write_source = torch.arange(self.num_rows, device=self.device)

    def _write_what_stays(self) -> None:
        stays = _Tokens()
        for index, row in enumerate(self.rows):
            end = row.past + row.count
            slot, sinks = row.sequence.slot, self.layout.num_sinks
            stays.add(index, slot, row.past, min(end, sinks), row.past)
            first = max(row.past, self._flushed_after(row))
            stays.add(index, slot, max(first, sinks), end, row.past)
        places = self._places(stays.slot.tensor(), stays.position.tensor())
        self.write_places = places.to(self.device)
        self.write_slots = self.write_places // self.layout.size
        self.write_offsets = self.write_places % self.layout.size
        self.write_source = (stays.row.tensor() * self.seq_len + stays.offset.tensor()).to(
            self.device
        )

    def _live(self, flushed: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """[n, W]: places that hold tokens of [0, num_sinks) or [flushed, length)."""
        sinks, ring = self.layout.num_sinks, self.layout.ring
        sink_live = torch.arange(sinks, device=self.device) < length.unsqueeze(1)
        step = (torch.arange(ring, device=self.device) + sinks - flushed.unsqueeze(1)) % ring
        return torch.cat([sink_live, step < (length - flushed).unsqueeze(1)], dim=1)

    def _places(self, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return (slot - self._first_slot) * self.layout.size + self.layout.place(position)

    def _reads(self, slots: list[int]) -> OwnerReads:
        return OwnerReads(self._tensor(slots), self.num_columns, tuple(slots))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


class _Tokens:
    """Collects runs of positions row by row."""

    def __init__(self):
        self.row, self.slot, self.position, self.offset = (_Column() for _ in range(4))

    def add(self, row: int, slot: int, first: int, last: int, past: int = 0) -> None:
        if last > first:
            run = torch.arange(first, last)
            self.row.append(torch.full_like(run, row))
            self.slot.append(torch.full_like(run, slot))
            self.position.append(run)
            self.offset.append(run - past)


class _Column(list):
    def tensor(self) -> torch.Tensor:
        return torch.cat(self) if self else torch.empty(0, dtype=torch.int64)
