"""Which tokens leave the windows in a step, and which of the new ones stay there.

Legend: a tokens that lie in windows, c tokens of this step, w new tokens that stay.
"""

from dataclasses import dataclass

import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.step_rows import RowsByRank, StepRow, WindowLayout


@dataclass
class FlushPlan:
    """What leaves the windows of this home rank, and how much leaves each rank's.

    Attributes:
        window_places: [a], flat places (slots x W) of tokens that lie in the window.
        chunk_source: [c], flat places of tokens of this step.
        slot: [a + c], sequence slot in the group, window tokens first.
        position: [a + c].
        counts: tokens that leave each rank.
        slots_by_rank: slots in the group of the sequences that tokens leave, by home rank.
        most_pages: at least the pages that any of them has filled on any rank afterwards.
        goes_far: some of what leaves any rank goes to another one.
    """

    window_places: torch.Tensor
    chunk_source: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    counts: list[int]
    slots_by_rank: list[list[int]]
    most_pages: int
    goes_far: bool


@dataclass
class WindowWrites:
    """New tokens that are put into this home rank's windows.

    Attributes:
        slots: [w], window slots of this rank.
        offsets: [w], places in those windows.
        source: [w], where the tokens come from among those of the step.
    """

    slots: torch.Tensor
    offsets: torch.Tensor
    source: torch.Tensor


def flushed_after(row: StepRow, decode_flushes: bool, layout: WindowLayout) -> int:
    """Tokens [num_sinks, that) of a row's sequence lie in shards after the step."""
    if row.is_decode and not decode_flushes:
        return row.sequence.flushed
    return max(row.sequence.flushed, row.end - layout.window)


def plan_flush(
    rows_by_rank: RowsByRank, rank: int, first_slot: int, decode_flushes: bool,
    layout: WindowLayout, footprint: Footprint, device: torch.device,
) -> FlushPlan | None:
    """What leaves in a step; None where nothing leaves any rank."""
    ends = [[flushed_after(row, decode_flushes, layout) for row in rows] for rows in rows_by_rank]
    counts = [
        sum(end - row.sequence.flushed for end, row in zip(*pair))
        for pair in zip(ends, rows_by_rank)
    ]
    if not any(counts):
        return None
    window, chunk, first_token = _Tokens(), _Tokens(), 0
    for row, last in zip(rows_by_rank[rank], ends[rank]):
        first, slot = row.sequence.flushed, row.sequence.slot
        # A decoding row's new token is written to the window before anything leaves it.
        split = row.end if row.is_decode else row.past
        window.add(slot, first, min(last, split))
        chunk.add(slot, max(first, split), last, first_token - row.past)
        first_token += row.count
    places = layout.place(window.position) + (window.slot - first_slot) * layout.size
    leaving = [
        [row.sequence.slot for end, row in zip(*pair) if end > row.sequence.flushed]
        for pair in zip(ends, rows_by_rank)
    ]
    longest = max(end for ranks in ends for end in ranks) - layout.num_sinks
    return FlushPlan(
        window_places=places.to(device),
        chunk_source=chunk.source.to(device),
        slot=torch.cat([window.slot, chunk.slot]).to(device),
        position=torch.cat([window.position, chunk.position]).to(device),
        counts=counts,
        slots_by_rank=leaving,
        most_pages=footprint.most_pages(longest),
        goes_far=footprint.is_far(longest),
    )


def plan_writes(
    rows: list[StepRow], first_token: int, first_slot: int, layout: WindowLayout,
    device: torch.device,
) -> WindowWrites:
    """Which tokens of rows, whose first token is number `first_token` of the step, stay."""
    stays = _Tokens()
    for row in rows:
        slot, shift = row.sequence.slot, first_token - row.past
        stays.add(slot, row.past, min(row.end, layout.num_sinks), shift)
        first = max(row.past, layout.num_sinks)
        if not row.is_decode:
            first = max(first, flushed_after(row, True, layout))
        stays.add(slot, first, row.end, shift)
        first_token += row.count
    return WindowWrites(
        (stays.slot - first_slot).to(device), layout.place(stays.position).to(device),
        stays.source.to(device),
    )


class _Tokens:
    """Collects runs of positions."""

    def __init__(self):
        self._runs: list[tuple[int, int, int, int]] = []

    def add(self, slot: int, first: int, last: int, shift: int = 0) -> None:
        """Positions [first, last) of a sequence, which are tokens [first + shift, ...) of the
        step."""
        if last > first:
            self._runs.append((slot, first, last, shift))

    @property
    def position(self) -> torch.Tensor:
        return self._join(torch.arange(first, last) for _, first, last, _ in self._runs)

    @property
    def slot(self) -> torch.Tensor:
        return self._join(
            torch.full((last - first,), slot) for slot, first, last, _ in self._runs
        )

    @property
    def source(self) -> torch.Tensor:
        return self._join(
            torch.arange(first + shift, last + shift) for _, first, last, shift in self._runs
        )

    def _join(self, parts) -> torch.Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
