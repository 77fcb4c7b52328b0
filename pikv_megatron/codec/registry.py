"""The codecs that `PiKVConfig.codec` can name: a transform and a format."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.codec.format.float8 import Float8Options
from pikv_megatron.codec.format.int2 import Int2Options
from pikv_megatron.codec.format.int3 import Int3Options
from pikv_megatron.codec.format.int4 import Int4Options
from pikv_megatron.codec.format.int8 import Int8Options
from pikv_megatron.codec.format.mixed import MixedOptions
from pikv_megatron.codec.format.plain import PlainOptions
from pikv_megatron.codec.transform.identity import IdentityOptions
from pikv_megatron.codec.transform.svd import SVDOptions
from pikv_megatron.options import Options, family
from pikv_megatron.types import KVShape

Transform = family(IdentityOptions, SVDOptions)
Format = family(
    PlainOptions, Float8Options, Int8Options, Int4Options, Int3Options, Int2Options, MixedOptions
)


class CodecOptions(Options):
    """How sealed pages are stored."""

    transform: Transform = Field(IdentityOptions(), description="what is stored of a token")
    format: Format = Field(PlainOptions(), description="how its numbers are packed")

    @field_validator("format", mode="before")
    @classmethod
    def _from_pair(cls, value: Any) -> Any:
        """`{keys: int4, values: int2}` needs no name."""
        is_pair = isinstance(value, dict) and value.keys() == {"keys", "values"}
        return {"name": "mixed", **value} if is_pair else value

    def build(self, kv: KVShape, page_size: int, num_slots: int) -> PageCodec:
        """The codec of a layer, for `num_slots` sequences.

        Raises:
            ValueError: a parameter does not fit the layer or the pages.
        """
        self.format.check(page_size)
        return PageCodec(kv, page_size, self.transform.build(kv, num_slots), self.format)


def _from_none(value: Any) -> Any:
    return {} if value == "none" else value


Codec = Annotated[CodecOptions, BeforeValidator(_from_none)]
