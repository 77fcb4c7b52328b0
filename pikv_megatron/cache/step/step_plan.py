"""What one forward pass does with the cache: computed once on the host, used by every layer.

The tokens of all rows lie one behind the other, so no row is padded to another's length: first
those of rows that decode, one each, then those of prompts.

Legend: n rows of this home rank, t tokens of them, T tokens of the forward pass, padding included.
"""

from typing import NamedTuple

import numpy as np
import torch

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.step.decode_part import DecodeNumbers, DecodePart
from pikv_megatron.cache.step.flush_plan import FlushNumbers, FlushPlan, WriteNumbers, flushed_after
from pikv_megatron.cache.step.one_copy import to_device
from pikv_megatron.cache.step.prefill_part import PrefillNumbers, PrefillPart
from pikv_megatron.cache.step.step_rows import RowFields, RowsByRank, Spans, WindowLayout
from pikv_megatron.ops.rotation import Rotation


class TokenNumbers(NamedTuple):
    """What the device is told of a step's tokens.

    Attributes:
        positions: [T], int64, 0 for padding.
        last_tokens: [n], int64, each row's last token.
    """

    positions: torch.Tensor
    last_tokens: torch.Tensor

    @classmethod
    def of(cls, rows: RowFields, num_padded: int) -> "TokenNumbers":
        """As arrays, of this rank's rows."""
        positions = np.zeros(num_padded, dtype=np.int64)
        own = Spans.of(rows.past, rows.end).number
        positions[: len(own)] = own
        return cls(positions, rows.first_token + rows.end - rows.past - 1)


class StepPlan:
    """Built on every rank from the same global list of rows.

    Args:
        rows_by_rank: the rows of each home rank, in any order.
        rank: this rank.
        slots_per_rank: window slots of a rank.
        layout: the windows' layout.
        footprint: what tokens in shards take on the ranks.
        device: where the tensors are needed.
        pads_evenly: every rank must forward the same number of tokens.

    Attributes:
        window: tokens that stay at home, the last ones.
        first_slot: in the group, of this rank.
        rows: of this rank, decoding ones first: the order of its tokens.
        num_tokens: t.
        num_padded: T, at least 1.
        tokens: of this rank.
        decode: the rows that feed one token.
        prefill: those that feed several.
        prefill_writes: what stays of these in the windows; None where no rank has any.
        flush: what leaves the windows, None where nothing leaves any rank.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, slots_per_rank: int, layout: WindowLayout,
        footprint: Footprint, device: torch.device, pads_evenly: bool,
    ):
        self._rows_by_rank = [sorted(rows, key=lambda r: not r.is_decode) for rows in rows_by_rank]
        self.window = layout.window
        self._rotary: tuple | None = None
        self.rows = self._rows_by_rank[rank]
        counts = [sum(row.count for row in rows) for rows in rows_by_rank]
        self.num_tokens = counts[rank]
        self.num_padded = max(1, *counts) if pads_evenly else max(1, self.num_tokens)
        self.first_slot = first_slot = rank * slots_per_rank
        decoding, prompts = (
            [[row for row in rows if row.is_decode == kind] for rows in self._rows_by_rank]
            for kind in (True, False)
        )
        fields, sinks = [RowFields.of(rows) for rows in self._rows_by_rank], layout.num_sinks
        first = [rows.first(len(own)) for rows, own in zip(fields, decoding)]
        rest = [rows.behind(len(own)) for rows, own in zip(fields, decoding)]
        self._ends = flushed_after(first, rest, layout)
        feeds_prompts = any(prompts)
        leaves = any((end > rows.flushed).any() for end, rows in zip(self._ends, fields))

        here = rank, first_slot, layout
        host = [TokenNumbers.of(fields[rank], self.num_padded), DecodeNumbers.of(first, *here)]
        if feeds_prompts:
            host.append(PrefillNumbers.of(rest, *here))
            host.append(WriteNumbers.of(rest[rank], len(decoding[rank]), first_slot, layout))
        if leaves:
            host.append(FlushNumbers.of(fields, self._ends, *here))
        moved = iter(to_device(host, device))
        self.tokens = next(moved)
        self.decode = DecodePart(decoding, rank, sinks, footprint, next(moved))
        numbers = next(moved) if feeds_prompts else None
        self.prefill = PrefillPart(prompts, rank, sinks, footprint, numbers)
        self.prefill_writes = next(moved) if feeds_prompts else None
        self.flush = None
        if leaves:
            self.flush = FlushPlan(fields, self._ends, footprint, next(moved))

    @property
    def only_decodes(self) -> bool:
        """Whether no rank feeds a prompt, and nothing leaves a window."""
        return not self.prefill.is_anywhere and self.flush is None

    @property
    def decode_shape(self) -> tuple:
        """What a step that only decodes has in common with others but for its numbers and pages."""
        part = self.decode
        return tuple(part.counts), self.num_padded, part.reads_shards, part.reads_far

    def take_numbers(self, other: "StepPlan") -> None:
        """Plan another step of this shape, in the memory of this plan."""
        own, new = ([*plan.tokens, *plan.decode.numbers] for plan in (self, other))
        for mine, others in zip(own, new):
            mine.copy_(others, non_blocking=True)
        self._rotary = None
        self.decode.forget()

    def rotary(
        self, table: torch.Tensor, mscale: float, is_interleaved: bool, dtype: torch.dtype
    ) -> Rotation:
        """The rotation by this step's angles: the same for queries and keys, in every layer.

        Args:
            table: [positions, 1, 1, hn], angles; the model gives all its layers the same one.
            mscale: factor on what is rotated.
            is_interleaved: channels 2 i and 2 i + 1 turn together, else i and i + hn / 2.
            dtype: of what is rotated.
        """
        if self._rotary is None or self._rotary[0] is not table:
            angles = table[self.tokens.positions[: self.num_tokens], 0]
            self._rotary = table, Rotation(angles, mscale, is_interleaved, dtype)
        return self._rotary[1]

    def finish(self) -> None:
        """Move every sequence on, after the last layer."""
        for rows, ends in zip(self._rows_by_rank, self._ends):
            for row, end in zip(rows, ends.tolist()):
                row.sequence.length, row.sequence.flushed = row.end, end

