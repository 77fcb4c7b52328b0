"""The codecs that `PiKVConfig.codec` can name: a transform and a format."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.codec.format.int4 import Int4Options
from pikv_megatron.codec.format.int8 import Int8Options
from pikv_megatron.codec.format.plain import PlainOptions
from pikv_megatron.codec.transform.identity import IdentityOptions
from pikv_megatron.codec.transform.svd import SVDOptions
from pikv_megatron.options import Options, family
from pikv_megatron.types import KVShape

Transform = family(IdentityOptions, SVDOptions)
Format = family(PlainOptions, Int8Options, Int4Options)


class CodecOptions(Options):
    """How sealed pages are stored."""

    transform: Transform = Field(IdentityOptions(), description="what is stored of a token")
    format: Format = Field(PlainOptions(), description="how its numbers are packed")

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
