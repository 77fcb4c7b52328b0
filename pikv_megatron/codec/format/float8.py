"""8 bits a number, floating."""

from typing import ClassVar, Literal

import torch

from pikv_megatron.codec.format.base import ScaledOptions


class Float8Options(ScaledOptions):
    """Numbers of float8 (e4m3), with scales."""

    name: Literal["float8"] = "float8"

    bits: ClassVar[int] = 8
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    has_zero: ClassVar[bool] = False
