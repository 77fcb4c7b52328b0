"""A page as the box around its keys (Quest, arXiv 2406.10774)."""

from typing import Literal

import torch

from pikv_megatron.sketch.base import PageSketcher, SketchOptions
from pikv_megatron.types import BoundingBoxSketch


class BoundingBoxOptions(SketchOptions):
    """The box around the keys (Quest): 2 / S of the keys' numbers; bounds every token's logit."""

    name: Literal["bounding_box"] = "bounding_box"

    def build(self, kv, page_size, num_slots):
        return BoundingBoxSketcher(kv, page_size)


class BoundingBoxSketcher(PageSketcher):
    """An upper bound rather than an estimate: shares of the mass are cautious."""

    def allocate(self, num_pages):
        shape = (self.kv.num_groups, num_pages, self.kv.key_width)
        low, high = (
            torch.zeros(shape, dtype=self.kv.dtype, device=self.kv.device) for _ in range(2)
        )
        return BoundingBoxSketch(low, high)
