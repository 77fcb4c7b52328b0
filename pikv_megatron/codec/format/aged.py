"""Newer pages in one format, older ones in another."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pikv_megatron.codec.format.base import FormatOptions, Older
from pikv_megatron.codec.format.float8 import Float8Options
from pikv_megatron.codec.format.int2 import Int2Options
from pikv_megatron.codec.format.int3 import Int3Options
from pikv_megatron.codec.format.int4 import Int4Options
from pikv_megatron.codec.format.int8 import Int8Options
from pikv_megatron.codec.format.mixed import MixedOptions, from_pair
from pikv_megatron.codec.format.plain import PlainOptions
from pikv_megatron.options import family

OneAge = Annotated[
    family(
        PlainOptions, Float8Options, Int8Options, Int4Options, Int3Options, Int2Options,
        MixedOptions,
    ),
    BeforeValidator(from_pair),
]


class AgedOptions(FormatOptions):
    """Newer pages in one format; older ones are sealed again, in another of fewer bits.

    A prompt's pages are sealed as new ones, chunk by chunk: `prefill_chunk_size` says how many
    there are at once.
    """

    name: Literal["aged"] = "aged"
    young: int = Field(4, ge=1, description="newest pages of a shard that are stored as `new`")
    new: OneAge = Field(Int4Options(), description="format of those")
    old: OneAge = Field(Int2Options(), description="format of all others")

    @property
    def older(self):
        return Older(self.young, self.old)

    @property
    def parts(self):
        return self.new, self.old

    def check(self, page_size):
        for part in self.parts:
            part.check(page_size)

    def wire_values(self, width):
        return self.new.wire_values(width)

    @property
    def is_packed(self):
        return self.new.is_packed

    def packed_keys(self, kv, num_pages, page_size):
        return self.new.packed_keys(kv, num_pages, page_size)

    def packed_values(self, kv, num_pages, page_size):
        return self.new.packed_values(kv, num_pages, page_size)
