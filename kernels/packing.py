"""Quantisation and packing in registers: what `pikv_megatron.ops.packing` does, bit for bit where
no sums are taken.

Legend: S tokens a page, P = 8 / bits tokens a byte, R = S / P byte rows a page. Numbers of 3 bits
are packed as 2 bits and 1 bit, and sealed in tiles of P = 8. A tile of a page
holds P planes of BLOCK_R >= R tokens, plane by plane: place i is token (i // BLOCK_R) * R +
i % BLOCK_R, if i % BLOCK_R < R. So a tile packs by one sum over planes, for any page size.
"""

import torch
import triton
import triton.language as tl

HALF_MAX: tl.constexpr = tl.constexpr(65504.0)
HALF_TINY: tl.constexpr = tl.constexpr(2.0**-24)
FLOAT8_MAX: tl.constexpr = tl.constexpr(448.0)
# Longer groups of two bits try three ranges.
SHORT_GROUP: tl.constexpr = tl.constexpr(32.0)
# Adding and taking away 1.5 * 2^23 leaves a float32 below 2^22 rounded to integers, half to even.
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def tile_tokens(first_row, R, PLANES: tl.constexpr, BLOCK_R: tl.constexpr):
    """Tokens of a tile that starts at byte row `first_row`, and which of its places are tokens.

    Example:
        S = 6 tokens of 4 bits: R = 3. BLOCK_R = 4: tokens 0 1 2 - 3 4 5 -.
    """
    place = tl.arange(0, PLANES * BLOCK_R)
    row = first_row + place % BLOCK_R
    return place // BLOCK_R * R + row, row < R


@triton.jit
def floor_half(x):
    """A float16 (as float32) that is not above x and next to it, saturating."""
    x = tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX)
    near = x.to(tl.float16).to(tl.float32)
    step = tl.maximum(tl.abs(near) * (0.75 / 1024), HALF_TINY)
    return tl.where(near > x, near - step, near).to(tl.float16).to(tl.float32)


@triton.jit
def affine_range(x, inside, AXIS: tl.constexpr, LEVELS: tl.constexpr):
    """Scale and zero point, along AXIS, of codes 0 to LEVELS that cover x where it is inside.

    Example:
        x 1, 0, 6 and 9, which is not inside; LEVELS 3: scale 2, zero 0.
    """
    low = tl.min(tl.where(inside, x, float("inf")), AXIS)
    high = tl.max(tl.where(inside, x, float("-inf")), AXIS)
    zero = floor_half(low)
    return -floor_half(-tl.div_rn(high - zero, LEVELS * 1.0)), zero


@triton.jit
def affine_codes(x, scale, zero, LEVELS: tl.constexpr):
    """Codes of x, int32 in [0, LEVELS].

    Example:
        x 2, scale 2, zero 0: 1.
    """
    codes = tl.div_rn(x - zero, tl.maximum(scale, HALF_TINY))
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS * 1.0)
    return ((codes + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def quantised(x, inside, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Codes of x, int32, and their scale and zero point along AXIS, where x is inside.

    Example:
        Two bits of 0, 0, 0, 1, 2, 2, 2, 6: codes 0, 0, 0, 0, 1, 1, 1, 3, scale 1.956, zero 0.158.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    scale, zero = affine_range(x, inside, AXIS, LEVELS)
    codes = affine_codes(x, tl.expand_dims(scale, AXIS), tl.expand_dims(zero, AXIS), LEVELS)
    if BITS < 8:
        line, line_scale, line_zero = _fitted(x, inside, AXIS, LEVELS)
        error = _squared_error(x, inside, codes, scale, zero, AXIS)
        is_good = _squared_error(x, inside, line, line_scale, line_zero, AXIS) <= 2 * error
        codes = tl.where(tl.expand_dims(is_good, AXIS), line, codes)
        scale = tl.where(is_good, line_scale, scale)
        zero = tl.where(is_good, line_zero, zero)
    return codes, scale, zero


@triton.jit
def _fitted(x, inside, AXIS: tl.constexpr, LEVELS: tl.constexpr):
    """Codes, int32, scale and zero point of a line through x, about its mean."""
    x = tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX)
    low = tl.min(tl.where(inside, x, HALF_MAX), AXIS)
    high = tl.max(tl.where(inside, x, -HALF_MAX), AXIS)
    middle = (low + high) / 2
    x = tl.where(inside, x - tl.expand_dims(middle, AXIS), 0.0)
    scale = (high - low) * (1.0 / LEVELS)
    codes = _from_middle(x, scale, AXIS, LEVELS)
    count = tl.maximum(tl.sum(inside.to(tl.float32), AXIS), 1.0)
    if LEVELS == 3:
        error = _squared_error(x, inside, codes, scale, scale * (-LEVELS / 2), AXIS)
        for step in tl.static_range(1, 3):
            part = scale * (1 - 0.15 * step)
            other = _from_middle(x, part, AXIS, LEVELS)
            new_error = _squared_error(x, inside, other, part, part * (-LEVELS / 2), AXIS)
            is_better = (new_error < error) & (count > SHORT_GROUP)
            codes = tl.where(tl.expand_dims(is_better, AXIS), other, codes)
            error = tl.where(is_better, new_error, error)
    mean = tl.sum(x, AXIS) / count
    x = tl.where(inside, x - tl.expand_dims(mean, AXIS), 0.0)
    level, about = _about_mean(codes, inside, count, AXIS)
    scale = _ratio(tl.sum(about * x, AXIS), tl.sum(about * about, AXIS))
    codes = affine_codes(x, tl.expand_dims(scale, AXIS), tl.expand_dims(-scale * level, AXIS),
                         LEVELS)
    level, about = _about_mean(codes, inside, count, AXIS)
    scale = tl.minimum(_ratio(tl.sum(x * x, AXIS), tl.sum(about * x, AXIS)), HALF_MAX)
    scale = scale.to(tl.float16).to(tl.float32)
    zero = tl.minimum(tl.maximum(middle + mean - scale * level, -HALF_MAX), HALF_MAX)
    return codes, scale, zero.to(tl.float16).to(tl.float32)


@triton.jit
def _from_middle(x, scale, AXIS: tl.constexpr, LEVELS: tl.constexpr):
    """Codes of x about 0.

    Example:
        x -1, 1 and 3, scale 2, LEVELS 3: zero -3, codes 1, 2 and 3.
    """
    scale = tl.expand_dims(scale, AXIS)
    return affine_codes(x, scale, scale * (-LEVELS / 2), LEVELS)


@triton.jit
def _about_mean(codes, inside, count, AXIS: tl.constexpr):
    """The mean of codes along AXIS, and their distances from it, 0 outside."""
    codes = codes.to(tl.float32)
    mean = tl.sum(tl.where(inside, codes, 0.0), AXIS) / count
    return mean, tl.where(inside, codes - tl.expand_dims(mean, AXIS), 0.0)


@triton.jit
def _ratio(above, below):
    """0 where numbers are all alike."""
    return tl.where(below > 0, above / tl.where(below > 0, below, 1.0), 0.0)


@triton.jit
def _squared_error(x, inside, codes, scale, zero, AXIS: tl.constexpr):
    """Along AXIS, of what is stored, where x is inside."""
    stored = codes.to(tl.float32) * tl.expand_dims(scale, AXIS) + tl.expand_dims(zero, AXIS)
    return tl.sum(tl.where(inside, (stored - x) * (stored - x), 0.0), AXIS)


@triton.jit
def float8_scale(x, inside, AXIS: tl.constexpr):
    """Scale, along AXIS, that maps x where it is inside to float8_e4m3fn, [-448, 448].

    Example:
        x -14 and 3.5: scale 1/32.
    """
    high = tl.max(tl.where(inside, tl.abs(x), 0.0), AXIS)
    return -floor_half(-tl.div_rn(high, FLOAT8_MAX))


@triton.jit
def float8_codes(x, scale):
    """x / scale as the bits of float8_e4m3fn, half to even: GPUs older than its own type do it too.

    Example:
        x 3.5, scale 1/32: 112 = 1.75 * 2^6, sign 0, exponent 6 + 7, mantissa 6: 01101110.
    """
    scaled = tl.div_rn(x, tl.maximum(scale, HALF_TINY))
    size = tl.minimum(tl.abs(scaled), FLOAT8_MAX)
    # Numbers below 2^-6 have its spacing, 2^-9; others an eighth of their power of two.
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127 - 6)
    rounder = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    size = (size + rounder) - rounder
    normal = (size.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    code = tl.where(size < 2.0**-6, (size * 512.0).to(tl.int32), normal)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def pack(codes, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """[PLANES * BLOCK_R, BLOCK_C] int32 codes of a tile -> [BLOCK_R, BLOCK_C], uint8.

    Example:
        Four planes of one row, 3, 0, 2, 1: one byte, 3 + 0 * 4 + 2 * 16 + 1 * 64 = 99.
    """
    planes = tl.reshape(codes, (PLANES, BLOCK_R, BLOCK_C))
    shift = tl.arange(0, PLANES) * (8 // PLANES)
    return tl.sum(planes << shift[:, None, None], axis=0).to(tl.uint8)


@triton.jit
def pack_low(codes, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The 2 lower bits of codes of 3 bits, a tile of 8 planes -> [BLOCK_R, BLOCK_C], uint8.

    A byte has the tokens of every second plane: those of plane 0, 2, 4 and 6 are in its first
    rows (HALF 0), those of plane 1, 3, 5 and 7 in rows that begin S / 8 further on (HALF 1).
    """
    pairs = tl.reshape(codes & 3, (4, 2, BLOCK_R, BLOCK_C))
    is_mine = (tl.arange(0, 2) == HALF)[None, :, None, None]
    shift = (tl.arange(0, 4) * 2)[:, None, None, None]
    bits = tl.where(is_mine, pairs << shift, 0)
    return tl.sum(tl.sum(bits, axis=0), axis=0).to(tl.uint8)


def packing_of(
    numbers: torch.Tensor, scale: torch.Tensor | None, page_size: int
) -> tuple[int, int]:
    """How keys or values [ng, p, rows, r] are stored.

    Returns:
        0 for plain numbers, 1 for float8, else the bits of a code; and the tokens of a stored row,
        of its lower bits where there are 3.

    Example:
        Pages of 16 tokens in 6 byte rows: 3 bits, 4 tokens.
    """
    if scale is None:
        return 0, 1
    if numbers.dtype == torch.float8_e4m3fn:
        return 1, 1
    bits = 8 * numbers.shape[2] // page_size
    return bits, 4 if bits == 3 else 8 // bits
