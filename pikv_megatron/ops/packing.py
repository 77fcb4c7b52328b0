"""Affine quantisation to 8, 4 or 2 bits and its packing, as `KVPages` and `LowRankSketch` hold it."""

import torch


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of x over its last dimension, which shares one scale and one zero point.

    Returns:
        codes like x, uint8 in [0, 2^bits); scale and zero [..., 1], float16, x = codes * scale + zero.

    Example:
        Two bits of 0, 1, 2, 6: zero 0, scale 2, codes 0, 0, 1, 3 (a half rounds to even).
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = low.half()
    # Of what float16 made of the zero point, so that the largest number is still reached.
    scale = ((high - zero.float()) / (2**bits - 1)).half()
    codes = (x - zero.float()) / scale.float().clamp(min=2**-24)
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8), scale, zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., S, r] of `bits` bits -> [..., S * bits / 8, r]; byte row i takes tokens i, i + R, ..."""
    planes = codes.unflatten(-2, (8 // bits, -1)).unbind(-3)
    packed = planes[0].clone()
    for order, plane in enumerate(planes[1:], start=1):
        packed |= plane << (order * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., R, r] -> [..., S, r], uint8 codes: the inverse of `pack`."""
    mask = 2**bits - 1
    planes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-2)
