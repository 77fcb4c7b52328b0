"""The sketches that `PiKVConfig.sketch` can name."""

from pikv_megatron.options import family
from pikv_megatron.sketch.bounding_box import BoundingBoxOptions
from pikv_megatron.sketch.keys import KeysOptions
from pikv_megatron.sketch.low_rank import LowRankOptions
from pikv_megatron.sketch.mean_key import MeanKeyOptions
from pikv_megatron.sketch.none import NoSketchOptions

Sketch = family(
    NoSketchOptions, MeanKeyOptions, BoundingBoxOptions, LowRankOptions, KeysOptions
)
