"""Quantisation to 8, 4, 3 or 2 bits or float8, and the packing that `KVPages` and sketches use.

Scales and zero points are float16. Where errors have to be bounded, both are rounded outwards, so
that the lowest number of a group is never below its zero point and the highest never above its last
code: a number and what is stored of it then differ by half a scale at most, however far from zero
the group lies. Where few bits have to say much, the ends of a group are better cut off, and what is
stored must not be smaller than what came: see `quantise`.
"""

import torch

from pikv_megatron.ops.backend import kernel_op

FLOAT8_MAX = 448.0
HALF_MAX = 65504.0
# The smallest positive float16: what a scale of 0 (all numbers alike) is replaced by in a division.
HALF_TINY = 2.0**-24
# Besides a group's range, parts of it about its middle, from which two bits of longer groups may
# start: the more numbers, the further out are its ends.
SHORT_GROUP, SHARES = 32, (0.85, 0.7)


def quantise(
    x: torch.Tensor, bits: int, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of x along `dim`, which shares one scale and one zero point.

    8 bits are those of `quantise_covering`, and fewer are of a line through the group, unless its
    squared error is more than twice as large, as far from zero, where float16 is coarse.

    The line of least squares would store numbers that are on the whole smaller than those that
    came, and of keys that flattens the attention. So it gives codes, and the scale is the one at
    which the stored numbers' product with the given ones, both about their means, is that of the
    given ones with themselves (so that products with queries are right in the mean, as RaBitQ's,
    arXiv 2405.12497, are). Two bits of long groups start from the best of three ranges.

    Args:
        x: any floating dtype; magnitudes beyond float16's 65504 saturate.
        bits: 8, 4, 3 or 2.
        dim: the dimension of a group.

    Returns:
        codes like x, uint8 in [0, 2^bits); scale and zero, float16, of size 1 along `dim`;
        x is about codes * scale + zero.

    Example:
        Two bits of 0, 0, 0, 1, 2, 2, 2, 6: codes 0, 0, 0, 0, 1, 1, 1, 3 of scale 1.956, zero 0.158.
    """
    kernel = kernel_op("quantise", x)
    if kernel is not None:
        return kernel(x, bits, dim)
    x = x.float()
    covering = quantise_covering(x, bits, dim)
    if bits == 8:
        return covering
    fitted = _fitted(x.clamp(-HALF_MAX, HALF_MAX), bits, dim)
    is_good = _squared_error(x, *fitted, dim) <= 2 * _squared_error(x, *covering, dim)
    codes, scale, zero = (torch.where(is_good, *pair) for pair in zip(fitted, covering))
    return codes.to(torch.uint8), scale.half(), zero.half()


def quantise_covering(
    x: torch.Tensor, bits: int, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `quantise`, with codes that reach from the lowest to the highest number of a group.

    Returns:
        codes, scale and zero; x = codes * scale + zero to half a scale.

    Example:
        Two bits of 0, 1, 2, 6: zero 0, scale 2, codes 0, 0, 1, 3 (a half rounds to even).
    """
    x = x.float()
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = floor_half(low)
    scale = ceil_half((high - zero.float()) / levels)
    return _nearest(x, scale.float(), zero.float(), levels).to(torch.uint8), scale, zero


def _fitted(
    x: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of the line, float32; the two last are of float16's numbers."""
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    middle, width = (low + high) / 2, high - low
    x = x - middle  # sums are of small numbers
    codes, error = _about_middle(x, width / levels, levels, dim)
    is_long = bits == 2 and x.shape[dim] > SHORT_GROUP
    for share in SHARES if is_long else ():
        other = _about_middle(x, width * (share / levels), levels, dim)
        is_better = other[1] < error
        codes, error = (torch.where(is_better, *pair) for pair in zip(other, (codes, error)))
    mean = x.mean(dim, keepdim=True)
    x = x - mean
    level = codes.mean(dim, keepdim=True)
    about = codes - level
    scale = _ratio((about * x).sum(dim, keepdim=True), about.square().sum(dim, keepdim=True))
    codes = _nearest(x, scale, -scale * level, levels)
    level = codes.mean(dim, keepdim=True)
    scale = _ratio(x.square().sum(dim, keepdim=True), ((codes - level) * x).sum(dim, keepdim=True))
    scale = scale.clamp(max=HALF_MAX).half().float()
    zero = (middle + mean - scale * level).clamp(-HALF_MAX, HALF_MAX).half().float()
    return codes, scale, zero


def _about_middle(
    x: torch.Tensor, scale: torch.Tensor, levels: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x with 0 in their middle, float32, and their squared error."""
    zero = scale * (-levels / 2)
    codes = _nearest(x, scale, zero, levels)
    return codes, _squared_error(x, codes, scale, zero, dim)


def _nearest(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> torch.Tensor:
    """Codes of x, float32."""
    return ((x - zero) / scale.clamp(min=HALF_TINY)).clamp_(0, levels).round_()


def _squared_error(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dim: int
) -> torch.Tensor:
    return (codes * scale.float() + zero.float() - x).square().sum(dim, keepdim=True)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """0 where numbers are all alike."""
    return torch.where(below > 0, above / below, 0.0)


def quantise_float8(x: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x along `dim`, float8_e4m3fn, so scaled that the largest magnitude becomes 448.

    Returns:
        codes like x; scale, float16, of size 1 along `dim`; x = codes * scale to 1/16 of x.

    Example:
        -14 and 3.5: scale 1/32, codes -448 and 112.
    """
    x = x.float()
    scale = ceil_half(x.abs().amax(dim, keepdim=True) / FLOAT8_MAX)
    codes = (x / scale.float().clamp(min=HALF_TINY)).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def floor_half(x: torch.Tensor) -> torch.Tensor:
    """A float16 that is not above x, float32, and next to it; -65504 for what lies below that.

    Example:
        0.1 lies between 0.09998 and 0.10004: it becomes the first of them, and -0.1 becomes
        -0.10004, though -0.09998 is nearer.
    """
    x = x.clamp(-HALF_MAX, HALF_MAX)
    near = x.half().float()
    # Three quarters of 2^-10 are 0.75 to 1.5 spacings of float16: they round to one step down.
    step = (near.abs() * (0.75 * 2.0**-10)).clamp_(min=HALF_TINY)
    return torch.where(near > x, near - step, near).half()


def ceil_half(x: torch.Tensor) -> torch.Tensor:
    """A float16 that is not below x, float32, and next to it; 65504 for what lies above that."""
    return -floor_half(-x)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., S, r] of `bits` bits -> [..., S * bits / 8, r]; byte row i has tokens i, i + R, ...

    Example:
        3 bits, 8 tokens: two rows of their 2 lower bits, then one row of their highest bit.
    """
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-2)
    planes = codes.unflatten(-2, (8 // bits, -1)).unbind(-3)
    packed = planes[0].clone()
    for order, plane in enumerate(planes[1:], start=1):
        packed |= plane << (order * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., R, r] -> [..., S, r], uint8 codes: the inverse of `pack`."""
    if bits == 3:
        rows = packed.shape[-2]
        low, high = packed.split([rows // 3 * 2, rows // 3], dim=-2)
        return unpack(low, 2) | unpack(high, 1) << 2
    mask = 2**bits - 1
    planes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-2)
