"""3 bits a number."""

from typing import ClassVar, Literal

from pikv_megatron.codec.format.base import ScaledOptions


class Int3Options(ScaledOptions):
    """3 bits a number, with scales and zero points."""

    name: Literal["int3"] = "int3"

    bits: ClassVar[int] = 3
