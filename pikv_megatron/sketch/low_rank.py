"""A page as its tokens' keys in a few leading directions, 2 or 4 bits (Loki, arXiv 2406.02542)."""

from typing import ClassVar, Literal

from pydantic import Field

from pikv_megatron.sketch.base import SketchOptions
from pikv_megatron.sketch.low_rank_bounds import BoundingLowRankSketcher
from pikv_megatron.sketch.low_rank_sketcher import LowRankSketcher


class LowRankOptions(SketchOptions):
    """Every token's key about its page's mean, in leading directions of its prompt, 2 or 4 bits
    each.
    """

    name: Literal["low_rank"] = "low_rank"
    rank: int | None = Field(None, ge=1, description="directions; null: half the width")
    bits: Literal[2, 4] = Field(2, description="of a number")

    can_bound: ClassVar[bool] = True

    def build(self, kv, page_size, num_slots, bounds=False):
        rank = self.rank or max(1, kv.key_width // 2)
        if rank > kv.key_width:
            raise ValueError(
                f"sketch.rank {rank} exceeds the width of a key, {kv.key_width}: lower it"
            )
        if page_size * self.bits % 8:
            raise ValueError(
                f"sketch.bits {self.bits}: a page of {page_size} tokens does not fill whole bytes; "
                f"make page_size a multiple of {8 // self.bits}"
            )
        kind = BoundingLowRankSketcher if bounds else LowRankSketcher
        return kind(kv, page_size, num_slots, rank, self.bits)
