"""A page as its mean key."""

from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import MeanKeySketch


class MeanKeySketcher(PageSketcher):
    """1 / S of the keys' bytes; good where the keys of a page are alike."""

    def sketch(self, keys):
        return MeanKeySketch(keys.mean(dim=2))
