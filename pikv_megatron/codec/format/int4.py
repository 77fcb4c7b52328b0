"""4 bits a number."""

from typing import ClassVar, Literal

from pikv_megatron.codec.format.base import ScaledOptions


class Int4Options(ScaledOptions):
    """4 bits a number, with scales and zero points."""

    name: Literal["int4"] = "int4"

    bits: ClassVar[int] = 4
