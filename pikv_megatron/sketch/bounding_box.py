"""A page as the box around its keys (Quest, arXiv 2406.10774)."""

from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import BoundingBoxSketch


class BoundingBoxSketcher(PageSketcher):
    """2 / S of the keys' bytes; bounds the logit of every token of the page from above."""

    def sketch(self, keys):
        low, high = keys.aminmax(dim=2)
        return BoundingBoxSketch(low, high)
