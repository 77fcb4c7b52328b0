"""A page as the box around its keys (Quest, arXiv 2406.10774)."""

import torch

from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import BoundingBoxSketch


class BoundingBoxSketcher(PageSketcher):
    """2 / S of the keys' bytes; bounds the logit of every token of the page from above."""

    def allocate(self, num_groups, num_pages, page_size, head_dim, dtype, device):
        shape = (num_groups, num_pages, head_dim)
        low, high = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return BoundingBoxSketch(low, high)
