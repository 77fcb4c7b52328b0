"""No sketches: nothing is remembered, so nothing can be judged."""

from typing import Literal

from pikv_megatron.sketch.base import SketchOptions


class NoSketchOptions(SketchOptions):
    """Nothing is remembered of a page."""

    name: Literal["none"] = "none"

    def build(self, kv, page_size, num_slots, bounds=False):
        return None
