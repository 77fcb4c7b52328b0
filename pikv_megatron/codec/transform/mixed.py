"""Keys by one linear method, values by another."""

from typing import Literal

from pydantic import Field

from pikv_megatron.codec.transform.base import TransformOptions
from pikv_megatron.codec.transform.chunkkv import ChunkKVOptions
from pikv_megatron.codec.transform.distillation import DistillationOptions
from pikv_megatron.codec.transform.fastv import FastVOptions
from pikv_megatron.codec.transform.linear import LinearTransform
from pikv_megatron.codec.transform.lora import LoRAOptions
from pikv_megatron.codec.transform.lora_plus import LoRAPlusOptions
from pikv_megatron.codec.transform.pruning import PruningOptions
from pikv_megatron.codec.transform.svd import SVDOptions
from pikv_megatron.options import family

Linear = family(
    LoRAOptions, LoRAPlusOptions, SVDOptions, ChunkKVOptions, FastVOptions, PruningOptions,
    DistillationOptions,
)


class MixedTransformOptions(TransformOptions):
    """Keys by one linear method, values by another: RoPE turns keys only."""

    name: Literal["mixed"] = "mixed"
    keys: Linear = Field(PruningOptions(), description="of keys")
    values: Linear = Field(SVDOptions(), description="of values")

    def build(self, kv, num_slots, moments=None):
        keys, values = (None, None) if moments is None else moments
        return LinearTransform(
            self.keys.key_map(kv, num_slots, keys), self.values.value_map(kv, num_slots, values)
        )
