"""What one forward pass does with the cache: computed once on the host, used by every layer.

The tokens of all rows lie one behind the other, so no row is padded to another's length: first
those of rows that decode, one each, then those of prompts.

Legend: n rows of this home rank, t tokens of them, T tokens of the forward pass, padding included.
"""

import torch

from pikv_megatron.cache.decode_part import DecodePart
from pikv_megatron.cache.flush_plan import flushed_after, plan_flush, plan_writes
from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.prefill_part import PrefillPart
from pikv_megatron.cache.rotation import Rotation
from pikv_megatron.cache.step_rows import RowsByRank, WindowLayout


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
        slots_per_rank: as given.
        first_slot: in the group, of this rank.
        rows: of this rank, decoding ones first: the order of its tokens.
        num_tokens: t.
        num_padded: T, at least 1.
        positions: [T], int64, 0 for padding.
        last_tokens: [n], int64, each row's last token.
        decode: the rows that feed one token.
        prefill: the others.
        decode_writes: the decoding rows' new tokens, all of which go to the window.
        prefill_writes: the prompts' tokens that stay there.
        flush: what leaves the windows, None where nothing leaves any rank.
    """

    def __init__(
        self, rows_by_rank: RowsByRank, rank: int, slots_per_rank: int, layout: WindowLayout,
        footprint: Footprint, device: torch.device, pads_evenly: bool,
    ):
        self._rows_by_rank = [sorted(rows, key=lambda r: not r.is_decode) for rows in rows_by_rank]
        self._layout = layout
        self.window, self.slots_per_rank = layout.window, slots_per_rank
        self._rotary: tuple | None = None
        self.rows = self._rows_by_rank[rank]
        counts = [sum(row.count for row in rows) for rows in rows_by_rank]
        self.num_tokens = counts[rank]
        self.num_padded = max(1, *counts) if pads_evenly else max(1, self.num_tokens)
        self._place_tokens(device)
        decoding, prompts = (
            [[r for r in rows if r.is_decode == kind] for rows in self._rows_by_rank]
            for kind in (True, False)
        )
        common = rank, slots_per_rank, layout, footprint, device
        self.decode, self.prefill = DecodePart(decoding, *common), PrefillPart(prompts, *common)
        self._decode_flushes = any(
            row.end - row.sequence.flushed >= layout.ring for rows in decoding for row in rows
        )
        self.first_slot = first_slot = rank * slots_per_rank
        self.flush = plan_flush(
            self._rows_by_rank, rank, first_slot, self._decode_flushes, layout, footprint, device
        )
        self.decode_writes = plan_writes(decoding[rank], 0, first_slot, layout, device)
        self.prefill_writes = plan_writes(
            prompts[rank], self.decode.num_rows, first_slot, layout, device
        )

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
            angles = table[self.positions[: self.num_tokens], 0]
            self._rotary = table, Rotation(angles, mscale, is_interleaved, dtype)
        return self._rotary[1]

    def finish(self) -> None:
        """Move every sequence on, after the last layer."""
        for row in (row for rows in self._rows_by_rank for row in rows):
            row.sequence.length = row.end
            row.sequence.flushed = flushed_after(row, self._decode_flushes, self._layout)

    def _place_tokens(self, device: torch.device) -> None:
        spans = [torch.arange(row.past, row.end) for row in self.rows]
        padding = torch.zeros(self.num_padded - self.num_tokens, dtype=torch.int64)
        self.positions = torch.cat([*spans, padding]).to(device)
        ends = torch.tensor([row.count for row in self.rows], dtype=torch.int64).cumsum(0)
        self.last_tokens = (ends - 1).to(device)
