"""What the cache has to know of a model's layers, before anything is allocated."""

from typing import Any, Mapping, NamedTuple

from torch import Tensor

from pikv_megatron.codec.transform.moments import KVMoments
from pikv_megatron.layer_options import LayerOptions
from pikv_megatron.types import KVShape


class LayerShape(NamedTuple):
    """One attention layer of a rank.

    Attributes:
        kv: what a token's keys and values are.
        num_heads: np, query heads.
        softmax_scale: factor on the logits.
        sliding_window: tokens that a query sees, its own included; None: all of them.
        sent_widths: numbers of a head's query and of its result as they travel to an owner and
            back; None: the widths of keys and values.
    """

    kv: KVShape
    num_heads: int
    softmax_scale: float
    sliding_window: int | None = None
    sent_widths: tuple[int, int] | None = None


class LayerSpec(NamedTuple):
    """One attention layer and the methods of its cache.

    Attributes:
        number: of the layer, from 1.
        kv: what a token's keys and values are.
        num_heads: np, query heads.
        softmax_scale: factor on the logits.
        sliding_window: tokens that a query sees, its own included; None: all of them.
        sent_widths: numbers of a head's query and of its result as they travel to an owner and
            back; None: the widths of keys and values.
        options: what is chosen for this layer.
        moments: of its keys and values, where they were calibrated: of all its tokens, or of those
            of each expert shard where its codec has bases of experts.
        fitted: all that was calibrated of it, by name (`calibrated.py`); None: nothing was.
        learned: what earlier runs learned of it, likewise, the calibration included.
    """

    number: int
    kv: KVShape
    num_heads: int
    softmax_scale: float
    sliding_window: int | None
    sent_widths: tuple[int, int] | None
    options: LayerOptions
    moments: tuple[KVMoments, ...] | None = None
    fitted: Mapping[str, Tensor] | None = None
    learned: Mapping[str, Tensor] | None = None

    @property
    def chosen(self) -> tuple[Any, ...]:
        """What is checked of a layer, the same for layers that are alike."""
        return self[1:7]
