"""Weights that are stored in few bits, dequantised while they are read.

Legend: r rows, c columns, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch

SCALE = "_scale_inv"  # behind the name of a block-scaled tensor
BLOCKS, SCALES = "_blocks", "_scales"  # behind that of an MXFP4 one
# E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, v1.0).
FP4_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*FP4_SIZES, *(-size for size in FP4_SIZES))
E8M0_BIAS = 127
MXFP4_BLOCK = 32  # numbers that share an exponent


def weight_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, of a `config.json`; None where nothing is quantised so.

    Raises:
        ValueError: the weights are quantised in a way that is not read.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "mxfp4":
        return None
    size = quantization.get("weight_block_size") if method == "fp8" else None
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"quantization_config.quant_method = {method!r} with weight_block_size = {size!r} is "
            "not supported: only 'fp8' in blocks and 'mxfp4' are; give the unquantised checkpoint"
        )
    return size[0], size[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a block-scaled tensor [..., r, c]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def block_scaled(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first: tuple[int, int]
) -> torch.Tensor:
    """Float32 of float8 `values` [r, c], a piece of a tensor that has a scale for each block.

    Args:
        values: the piece.
        scale: [R, C], of the whole tensor.
        block: rows and columns that share a scale.
        first: the whole tensor's row and column where the piece begins.
    """
    rows, columns = (
        (torch.arange(size) + start) // step
        for size, start, step in zip(values.shape, first, block)
    )
    return values.float() * scale.float()[rows][:, columns]


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 of MXFP4 rows: 32 numbers of four bits share a power of two.

    Args:
        blocks: [r, n, 16], uint8, two numbers each, the first one in the lower bits.
        scales: [r, n], uint8, exponents.

    Returns:
        [r, n * 32].
    """
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(2)
    numbers = torch.tensor(FP4_VALUES)[pairs.long()]
    return torch.ldexp(numbers, (scales.int() - E8M0_BIAS).unsqueeze(-1)).flatten(1)
