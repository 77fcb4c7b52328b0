"""A page as its mean key."""

from typing import Literal

import torch

from pikv_megatron.sketch.base import PageSketcher, SketchOptions
from pikv_megatron.types import MeanKeySketch


class MeanKeyOptions(SketchOptions):
    """The mean key: 1 / S of the keys' numbers; good where the keys of a page are alike."""

    name: Literal["mean_key"] = "mean_key"

    def build(self, kv, page_size, num_slots, bounds=False):
        return MeanKeySketcher(kv, page_size)


class MeanKeySketcher(PageSketcher):
    """By Jensen's inequality it never overestimates what a page would give."""

    def allocate(self, num_pages):
        shape = (self.kv.num_groups, num_pages, self.kv.key_width)
        return MeanKeySketch(torch.zeros(shape, dtype=self.kv.dtype, device=self.kv.device))
