"""Sketchers by the name they have in `PiKVConfig.sketch`."""

from pikv_megatron.sketch.bounding_box import BoundingBoxSketcher
from pikv_megatron.sketch.mean_key import MeanKeySketcher

SKETCHERS = {"mean_key": MeanKeySketcher, "bounding_box": BoundingBoxSketcher}
