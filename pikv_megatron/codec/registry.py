"""The codecs that `PiKVConfig.codec` can name: a transform and a format."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.codec.format.aged import AgedOptions
from pikv_megatron.codec.format.base import num_groups
from pikv_megatron.codec.format.float8 import Float8Options
from pikv_megatron.codec.format.int2 import Int2Options
from pikv_megatron.codec.format.int3 import Int3Options
from pikv_megatron.codec.format.int4 import Int4Options
from pikv_megatron.codec.format.int8 import Int8Options
from pikv_megatron.codec.format.mixed import MixedOptions, from_pair
from pikv_megatron.codec.format.plain import PlainOptions
from pikv_megatron.codec.key_angles import KeyAngles
from pikv_megatron.codec.rotation import RotatedTransform
from pikv_megatron.codec.transform.chunkkv import ChunkKVOptions
from pikv_megatron.codec.transform.distillation import DistillationOptions
from pikv_megatron.codec.transform.fastv import FastVOptions
from pikv_megatron.codec.transform.identity import IdentityOptions
from pikv_megatron.codec.transform.lora import LoRAOptions
from pikv_megatron.codec.transform.lora_plus import LoRAPlusOptions
from pikv_megatron.codec.transform.mixed import MixedTransformOptions
from pikv_megatron.codec.transform.moments import KVMoments
from pikv_megatron.codec.transform.pruning import PruningOptions
from pikv_megatron.codec.transform.pyramidkv import PyramidKVOptions
from pikv_megatron.codec.transform.svd import SVDOptions
from pikv_megatron.codec.wire import KEY_GROUP, Wire, WireSide
from pikv_megatron.options import Options, family
from pikv_megatron.types import KVShape

Transform = family(
    IdentityOptions, LoRAOptions, LoRAPlusOptions, SVDOptions, ChunkKVOptions, FastVOptions,
    PruningOptions, DistillationOptions, MixedTransformOptions, PyramidKVOptions,
)
Format = family(
    PlainOptions, Float8Options, Int8Options, Int4Options, Int3Options, Int2Options, MixedOptions,
    AgedOptions,
)


class CodecOptions(Options):
    """How sealed pages are stored."""

    transform: Transform = Field(IdentityOptions(), description="what is stored of a token")
    rotation: Literal["none", "hadamard"] = Field(
        "none", description="of stored numbers, before they are packed"
    )
    format: Format = Field(PlainOptions(), description="how its numbers are packed")
    keys: Literal["after_rope", "before_rope"] = Field(
        "after_rope", description="whether keys are stored as RoPE turned them, or are turned anew"
    )

    @field_validator("transform", "format", mode="before")
    @classmethod
    def _from_pair(cls, value: Any) -> Any:
        """Two formats need no name, nor do two transforms."""
        return from_pair(value)

    def build(
        self, kv: KVShape, page_size: int, num_slots: int,
        moments: Sequence[KVMoments] | None = None, shards: Sequence[int] = (0,),
        num_positions: int = 0,
    ) -> PageCodec:
        """The codec of a layer, for `num_slots` sequences.

        Args:
            moments: of the layer's keys and values, where it was calibrated: all of them, or of
                every shard where the transform is by expert.
            shards: of a sequence that this rank has, by number.
            num_positions: that tokens can have.

        Raises:
            ValueError: a parameter does not fit the layer or the pages.
        """
        if kv.values_in_keys:
            self._refuse_unshared()
        if self.transform.ageing is not None and self.format.older is not None:
            raise ValueError(
                f"codec.transform.young {self.transform.ageing.young} pools older pages, and "
                f"codec.format aged packs them anew: leave out one of the two"
            )
        if self.keys == "before_rope":
            self._refuse_other_channels(kv)
        num_bases = 1
        if self.transform.is_by_expert:
            num_bases = len(shards)
            moments = moments and [moments[shard] for shard in shards]
        transform = self.transform.build(kv, num_slots * num_bases, moments, num_bases)
        if self.rotation == "hadamard":
            transform = RotatedTransform(kv, transform)
        pooled = 1 if transform is None else transform.pooled
        if page_size % pooled:
            raise ValueError(
                f"codec.transform {self.transform.name} stores {pooled} tokens as one: page_size "
                f"{page_size} must be a multiple of {pooled}"
            )
        self.format.check(page_size // pooled)
        return PageCodec(
            kv, page_size, transform, self.format, self.transform.ageing, num_bases,
            KeyAngles(kv, num_positions) if self.keys == "before_rope" else None,
        )

    def wire(self, kv: KVShape) -> Wire:
        """How tokens travel to their shards; `kv` as computed.

        Values that are turned before they are packed would be rounded twice: they travel as keys.
        """
        has_keys, has_values = self.format.is_packed
        is_turned = self.rotation != "none" or not isinstance(self.transform, IdentityOptions)
        values = None
        if has_values and not kv.values_in_keys:
            values = self.format.wire_values(kv.value_width)
            values = _coarse(kv.value_width) if is_turned else values
        return Wire(_coarse(kv.key_width) if has_keys else None, values)

    def _refuse_other_channels(self, kv: KVShape) -> None:
        """Keys that are turned where they are read have all their channels there."""
        for name, method, is_fine in (
            ("transform", self.transform.name, self.transform.leaves_keys),
            ("rotation", self.rotation, self.rotation == "none"),
        ):
            if not is_fine:
                raise ValueError(
                    f"codec.keys before_rope turns keys where they are read, in their own "
                    f"channels, and codec.{name} {method} stores others: leave out one of the two"
                )
        if kv.values_in_keys:
            raise ValueError(
                "codec.keys before_rope: latent attention stores keys and values in one row, of "
                "which RoPE turned the last channels only; leave it out for these layers"
            )

    def _refuse_unshared(self) -> None:
        """Latent attention stores values as columns of the keys."""
        apart = [
            f"codec.{field} {name!r}" for field, name, is_asked in (
                ("transform", "mixed", self.transform.name == "mixed"),
                ("format", "mixed", any(x.name == "mixed" for x in self.format.parts)),
                ("rotation", "hadamard", self.rotation == "hadamard"),
            ) if is_asked
        ]
        if apart:
            raise ValueError(
                f"{apart[0]} treats keys and values apart, and the values of latent attention are "
                "columns of its keys: leave it out for these layers"
            )


def _coarse(width: int) -> WireSide:
    return WireSide(8, num_groups(width, KEY_GROUP))


def _from_none(value: Any) -> Any:
    return {} if value == "none" else value


Codec = Annotated[CodecOptions, BeforeValidator(_from_none)]
