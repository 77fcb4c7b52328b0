"""What a home rank remembers of a page, so that relevance can be judged without asking its owner.

Legend: ng KV heads, c pages, S tokens a page, hn head width.
"""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.types import PageSketch


class PageSketcher(ABC):
    """A kind of sketch, made when a page is sealed, from its keys as computed."""

    @abstractmethod
    def allocate(
        self, num_groups: int, num_pages: int, page_size: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> PageSketch:
        """Room for the sketches of `num_pages` pages; every tensor is [ng, num_pages, ...]."""

    def write(self, keys: torch.Tensor, sketch: PageSketch, page: torch.Tensor) -> None:
        """Sketch pages [ng, c, S, hn] into the places `page` [c]."""
        make_sketch(keys, sketch, page)
