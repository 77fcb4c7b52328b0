"""Which tokens leave the windows in a step, and which of a prompt's stay there.

Legend: a tokens that lie in windows, c tokens of this step, w new tokens that stay, r sequences of
all ranks that tokens leave, q of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.step.step_rows import RowFields, Spans, WindowLayout

Made = TypeVar("Made")


class FlushNumbers(NamedTuple):
    """What the device is told of tokens that leave.

    Attributes:
        window_places: [a], flat places (slots x W) of tokens that lie in the window.
        chunk_source: [c], flat places of tokens of this step.
        slot: [a + c], sequence slot in the group, window tokens first.
        position: [a + c].
        all_slots: [r], int64, slots in the group of the sequences that tokens leave, rank by rank.
        window_slots: [q], int64, slots on this rank of its own.
    """

    window_places: torch.Tensor
    chunk_source: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    all_slots: torch.Tensor
    window_slots: torch.Tensor

    @classmethod
    def of(
        cls, by_rank: list[RowFields], ends: list[np.ndarray], rank: int, first_slot: int,
        layout: WindowLayout,
    ) -> "FlushNumbers":
        """As arrays, of the rows of each rank; see `FlushPlan` for the arguments."""
        rows, last = by_rank[rank], ends[rank]
        # A decoding row's new token is written to the window before anything leaves it.
        split = np.where(rows.is_decode, rows.end, rows.past)
        old = Spans.of(rows.flushed, np.minimum(last, split))
        new = Spans.of(np.maximum(rows.flushed, split), last)
        leaving = [fields.slot[end > fields.flushed] for fields, end in zip(by_rank, ends)]
        places = layout.place(old.number) + (rows.slot[old.run] - first_slot) * layout.size
        shift = rows.first_token - rows.past
        return cls(
            places, new.number + shift[new.run],
            np.concatenate([rows.slot[old.run], rows.slot[new.run]]),
            np.concatenate([old.number, new.number]),
            np.concatenate(leaving), leaving[rank] - first_slot,
        )


class FlushPlan:
    """How much leaves the windows.

    Args:
        by_rank: the rows of each rank.
        ends: tokens of each row that lie in windows no more after the step.
        footprint: what tokens in shards take on the ranks.
        numbers: of this rank's tokens, on the device.

    Attributes:
        numbers: as given.
        counts: tokens that leave each rank.
        num_sequences: of each rank, those that tokens leave.
        most_pages: at least the pages that any of them has filled on any rank afterwards.
        goes_far: some of what leaves any rank goes to another one.
        num_stored: pages that this rank fills; None: the experts decide it.
        num_noted: pages that its own sequences fill on all ranks; likewise.
    """

    def __init__(
        self, by_rank: list[RowFields], ends: list[np.ndarray], footprint: Footprint,
        numbers: FlushNumbers,
    ):
        self.numbers = numbers
        leaving = [end - rows.flushed for end, rows in zip(ends, by_rank)]
        self.counts = [int(own.sum()) for own in leaving]
        self.num_sequences = [int((own > 0).sum()) for own in leaving]
        placement = footprint.placement
        longest = max(int(end.max()) for end in ends if len(end)) - placement.num_sinks
        self.most_pages = footprint.most_pages(longest)
        self.goes_far = footprint.is_far(longest)
        self._is_alike = placement.expert_shards == 1
        self._shared: dict[str, object] = {}
        self.num_stored = self.num_noted = None
        if self._is_alike:
            filled = [
                footprint.filled_pages(home, rows.flushed, end)
                for home, (rows, end) in enumerate(zip(by_rank, ends))
            ]
            self.num_stored = sum(int(own[placement.rank]) for own in filled)
            self.num_noted = int(filled[placement.rank].sum())

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What is the same in every layer, made by the first; by each, where experts decide."""
        if not self._is_alike:
            return make()
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


class WriteNumbers(NamedTuple):
    """Tokens of prompts that are put into this home rank's windows.

    Attributes:
        slots: [w], window slots of this rank.
        places: [w], in those windows.
        source: [w], where the tokens come from among those of the step.
    """

    slots: torch.Tensor
    places: torch.Tensor
    source: torch.Tensor

    @classmethod
    def of(
        cls, rows: RowFields, first_token: int, first_slot: int, layout: WindowLayout
    ) -> "WriteNumbers":
        """As arrays, of rows whose first token is number `first_token` of the step."""
        left = np.maximum(rows.flushed, rows.end - layout.window)
        first = np.maximum(np.maximum(rows.past, layout.num_sinks), left)
        sinks = Spans.of(rows.past, np.minimum(rows.end, layout.num_sinks))
        ring = Spans.of(first, rows.end)
        run, position = (np.concatenate(pair) for pair in zip(sinks, ring))
        shift = first_token + rows.first_token - rows.past
        return cls(rows.slot[run] - first_slot, layout.place(position), position + shift[run])


def flushed_after(
    decoding: list[RowFields], prompts: list[RowFields], layout: WindowLayout
) -> list[np.ndarray]:
    """By rank, for its decoding rows and the others behind them: tokens [num_sinks, that) of the
    sequence lie in shards after the step.

    Prompts leave at once; decoding rows together, when the ring of one of them is full.
    """
    is_full = any((rows.end - rows.flushed >= layout.ring).any() for rows in decoding)
    window = layout.window
    return [
        np.concatenate([
            np.maximum(first.flushed, first.end - window) if is_full else first.flushed,
            np.maximum(rest.flushed, rest.end - window),
        ])
        for first, rest in zip(decoding, prompts)
    ]
