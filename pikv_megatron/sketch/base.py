"""What a home rank remembers of a page, so that relevance can be judged without asking its owner.

Legend: ng KV heads, c pages, S tokens a page, hn head width.
"""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import PageSketch


class PageSketcher(ABC):
    """Makes the sketch of a page when it is sealed, from its keys as computed."""

    @abstractmethod
    def sketch(self, keys: torch.Tensor) -> PageSketch:
        """Sketch pages [ng, c, S, hn]; every tensor of the result is [ng, c, ...]."""
