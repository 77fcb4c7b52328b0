"""Keys by one linear method, values by another."""

from typing import Literal

from pydantic import Field, model_validator

from pikv_megatron.codec.transform.base import TransformOptions
from pikv_megatron.codec.transform.chunkkv import ChunkKVOptions
from pikv_megatron.codec.transform.distillation import DistillationOptions
from pikv_megatron.codec.transform.fastv import FastVOptions
from pikv_megatron.codec.transform.identity import IdentityOptions
from pikv_megatron.codec.transform.linear import LinearTransform
from pikv_megatron.codec.transform.lora import LoRAOptions
from pikv_megatron.codec.transform.lora_plus import LoRAPlusOptions
from pikv_megatron.codec.transform.pruning import PruningOptions
from pikv_megatron.codec.transform.svd import SVDOptions
from pikv_megatron.options import family

Linear = family(
    IdentityOptions, LoRAOptions, LoRAPlusOptions, SVDOptions, ChunkKVOptions, FastVOptions,
    PruningOptions, DistillationOptions,
)


class MixedTransformOptions(TransformOptions):
    """Keys by one linear method, values by another: RoPE turns keys only."""

    name: Literal["mixed"] = "mixed"
    keys: Linear = Field(PruningOptions(), description="of keys")
    values: Linear = Field(SVDOptions(), description="of values")

    @model_validator(mode="after")
    def _have_bases_alike(self) -> "MixedTransformOptions":
        learning = [x for x in (self.keys, self.values) if not isinstance(x, IdentityOptions)]
        if len({x.is_by_expert for x in learning}) > 1:
            raise ValueError(
                "per_expert: keys and values have bases for the same tokens; set it for both, or "
                "leave one of them as it is (identity)"
            )
        return self

    @property
    def leaves_keys(self):
        return isinstance(self.keys, IdentityOptions)

    @property
    def is_by_expert(self):
        return self.keys.is_by_expert or self.values.is_by_expert

    def build(self, kv, num_slots, moments=None, num_bases=1):
        keys, values = (None, None) if moments is None else zip(*moments)
        return LinearTransform(
            self.keys.key_map(kv, num_slots, keys, num_bases),
            self.values.value_map(kv, num_slots, values, num_bases),
        )
