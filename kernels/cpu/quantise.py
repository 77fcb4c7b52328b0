"""Codes of few bits: `quantise.cpp`."""

from math import prod

import torch

from pikv_kernels.cpu.compiled import call


def quantise(
    x: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `pikv_megatron.ops.packing.quantise`."""
    x, dim = x.float().contiguous(), dim % x.ndim
    shape = x.shape
    codes = torch.empty(shape, dtype=torch.uint8)
    scale, zero = (torch.empty(*shape[:dim], 1, *shape[dim + 1 :]) for _ in range(2))
    if codes.numel():
        call("quantise", [
            prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :]), bits, x.data_ptr(),
            codes.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        ])
    return codes, scale.half(), zero.half()
