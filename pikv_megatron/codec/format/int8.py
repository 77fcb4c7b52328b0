"""8 bits a number."""

from typing import ClassVar, Literal

from pikv_megatron.codec.format.base import ScaledOptions


class Int8Options(ScaledOptions):
    """8 bits a number, with scales and zero points."""

    name: Literal["int8"] = "int8"

    bits: ClassVar[int] = 8
