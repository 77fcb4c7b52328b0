"""A page as its mean key."""

import torch

from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import MeanKeySketch


class MeanKeySketcher(PageSketcher):
    """1 / S of the keys' bytes; good where the keys of a page are alike."""

    def allocate(self, num_groups, num_pages, page_size, head_dim, dtype, device):
        shape = (num_groups, num_pages, head_dim)
        return MeanKeySketch(torch.zeros(shape, dtype=dtype, device=device))
