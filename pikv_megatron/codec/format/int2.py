"""2 bits a number."""

from typing import ClassVar, Literal

from pikv_megatron.codec.format.base import ScaledOptions


class Int2Options(ScaledOptions):
    """2 bits a number, with scales and zero points."""

    name: Literal["int2"] = "int2"

    bits: ClassVar[int] = 2
