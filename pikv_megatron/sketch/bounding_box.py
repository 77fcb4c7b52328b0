"""A page as boxes around its keys (Quest, arXiv 2406.10774).

Legend: ng KV heads, p pages, b boxes a page, n sequences, np query heads, m pages listed for a
sequence, hn head width.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.sketch.base import PageSketcher, SketchOptions
from pikv_megatron.types import BoundingBoxSketch, KVShape


class BoundingBoxOptions(SketchOptions):
    """Boxes around the keys (Quest), 2 numbers a channel and box; they bound every token's logit.
    """

    name: Literal["bounding_box"] = "bounding_box"
    tokens: int = Field(
        16, ge=1, description="neighbours that share a box, at most; a page is parted evenly"
    )

    can_bound: ClassVar[bool] = True

    def build(self, kv, page_size, num_slots, bounds=False):
        fewest = -(-page_size // self.tokens)
        boxes = next(b for b in range(fewest, page_size + 1) if page_size % b == 0)
        return BoundingBoxSketcher(kv, page_size, boxes)


class BoundingBoxSketcher(PageSketcher):
    """An upper bound rather than an estimate: shares of the mass are cautious.

    Args:
        num_boxes: b. Keys that lie far apart make a box large, and its bound loose.
    """

    def __init__(self, kv: KVShape, page_size: int, num_boxes: int):
        super().__init__(kv, page_size)
        self._boxes, self._tokens = num_boxes, page_size // num_boxes

    def allocate(self, num_pages):
        """Low and high ends [ng, p, b * hn]."""
        shape = (self.kv.num_groups, num_pages, self._boxes * self.kv.key_width)
        low, high = (
            torch.zeros(shape, dtype=self.kv.dtype, device=self.kv.device) for _ in range(2)
        )
        return BoundingBoxSketch(low, high)

    def write(self, keys, sketch, page, slots):
        parts = keys.unflatten(2, (self._boxes, -1)).flatten(1, 2)
        make_sketch(parts, self._parted(sketch), self._places(page.unsqueeze(1)).flatten())

    def logits(self, query, sketch, table, lens, slots, softmax_scale):
        if self._boxes == 1:
            return super().logits(query, sketch, table, lens, slots, softmax_scale)
        parted, rows, lens_of = self._listed(sketch, table, lens)
        logit = score_pages(query, parted, rows, lens_of, 0, softmax_scale, "mass").logit
        logit = self._by_page(logit)
        return logit, logit.softmax(dim=2).mean(dim=1).masked_fill(lens == 0, 0.0)

    def bounds(self, query, sketch, table, lens, slots, softmax_scale):
        """Every key of a box lies between the corners that the query chooses."""
        parted, rows, lens_of = self._listed(sketch, table, lens)
        most, least = (
            score_pages(x, parted, rows, lens_of, 0, softmax_scale, "best").logit
            for x in (query, -query)
        )
        size = lens_of.log().unsqueeze(1)  # -inf where nothing is listed
        least = least.masked_fill(size == -torch.inf, 0.0)
        return self._by_page(size - least), self._by_page(size + most)

    def _parted(self, sketch: BoundingBoxSketch) -> BoundingBoxSketch:
        """A box a row, [ng, p * b, hn], in the same memory."""
        if self._boxes == 1:
            return sketch
        return BoundingBoxSketch(
            *(end.unflatten(2, (self._boxes, -1)).flatten(1, 2) for end in sketch)
        )

    def _places(self, page: torch.Tensor) -> torch.Tensor:
        """Rows [..., b] of the boxes of pages [..., 1]."""
        return page * self._boxes + torch.arange(self._boxes, device=page.device)

    def _listed(
        self, sketch: BoundingBoxSketch, table: torch.Tensor, lens: torch.Tensor
    ) -> tuple[BoundingBoxSketch, torch.Tensor, torch.Tensor]:
        """Boxes, their rows and their tokens, [n, m * b], of pages [n, m]."""
        if self._boxes == 1:
            return sketch, table, lens
        first = torch.arange(self._boxes, device=lens.device, dtype=lens.dtype) * self._tokens
        tokens = (lens.unsqueeze(2) - first).clamp(0, self._tokens)
        rows = self._places(table.unsqueeze(2))
        return self._parted(sketch), rows.flatten(1), tokens.flatten(1)

    def _by_page(self, logit: torch.Tensor) -> torch.Tensor:
        """Boxes [n, np, m * b] -> pages [n, np, m]."""
        if self._boxes == 1:
            return logit
        return logit.unflatten(2, (-1, self._boxes)).logsumexp(dim=3)
