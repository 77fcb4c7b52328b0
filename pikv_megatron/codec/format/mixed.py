"""Keys in one format, values in another."""

from typing import Any, Literal

from pydantic import Field

from pikv_megatron.codec.format.base import FormatOptions
from pikv_megatron.codec.format.float8 import Float8Options
from pikv_megatron.codec.format.int2 import Int2Options
from pikv_megatron.codec.format.int3 import Int3Options
from pikv_megatron.codec.format.int4 import Int4Options
from pikv_megatron.codec.format.int8 import Int8Options
from pikv_megatron.codec.format.plain import PlainOptions
from pikv_megatron.options import family

Single = family(
    PlainOptions, Float8Options, Int8Options, Int4Options, Int3Options, Int2Options
)


def from_pair(value: Any) -> Any:
    """`{keys: int4, values: int2}` needs no name."""
    is_pair = isinstance(value, dict) and value.keys() == {"keys", "values"}
    return {"name": "mixed", **value} if is_pair else value


class MixedOptions(FormatOptions):
    """Keys in one format, values in another: keys need more bits."""

    name: Literal["mixed"] = "mixed"
    keys: Single = Field(Int4Options(), description="format of keys")
    values: Single = Field(Int2Options(), description="format of values")

    def check(self, page_size):
        self.keys.check(page_size)
        self.values.check(page_size)

    def wire_values(self, width):
        return self.values.wire_values(width)

    @property
    def is_packed(self):
        return self.keys.is_packed[0], self.values.is_packed[1]

    def packed_keys(self, kv, num_pages, page_size):
        return self.keys.packed_keys(kv, num_pages, page_size)

    def packed_values(self, kv, num_pages, page_size):
        return self.values.packed_values(kv, num_pages, page_size)
