"""Tiles of stored pages, dequantised in registers: the `KVPages` layout, seen from a kernel.

Legend: S tokens a page, R stored rows a page, P = S / R planes, r a stored width.

A tile is BLOCK_N stored rows of one or several pages. It is loaded once; plane i of it is a tile of
BLOCK_N tokens: row j of a page holds its tokens j, j + R, j + 2 R, ...
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(pool, page, row, is_row, channel, strides, WIDTH: tl.constexpr):
    """[BLOCK_N, BLOCK_R] of a pool [p, R, r] as stored, 0 outside.

    Args:
        pool: pointer to the head's pages.
        page: [BLOCK_N], page numbers; a pool may have more than 2^31 numbers.
        row: [BLOCK_N], stored row within the page.
        is_row: [BLOCK_N], whether to load it.
        channel: [BLOCK_R], of which those below WIDTH are loaded.
        strides: of the head, the page and the row.
    """
    place = page.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
    inside = is_row[:, None] & (channel < WIDTH)[None, :]
    return tl.load(pool + place[:, None] + channel[None, :], mask=inside, other=0)


@triton.jit
def plane_numbers(stored, PLANE: tl.constexpr, PLANES: tl.constexpr, IS_FLOAT8: tl.constexpr):
    """The numbers of one plane, float32, not yet scaled.

    Example:
        Two bits, P = 4: the byte 99 = 3 + 0 * 4 + 2 * 16 + 1 * 64 is 3, 0, 2, 1 in planes 0 to 3.
        Float8 e4m3, byte 0x38 = 0 0111 000 is 1. As float16, its bits are 0 00111 0000000000, which
        is 2^(7 - 15) = 2^-8: the two exponents are biased by 7 and by 15. 2^-8 * 256 = 1.
    """
    if IS_FLOAT8:
        # Done by hand, since compilers have the conversion for some architectures only.
        wide = stored.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        BITS: tl.constexpr = 8 // PLANES
        numbers = ((stored >> (PLANE * BITS)) & (2**BITS - 1)).to(tl.float32)
    return numbers


@triton.jit
def load_keys(
    stored, scale, zero, scale_strides, zero_strides, page, row, is_row, channel,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PLANE: tl.constexpr, IS_FLOAT8: tl.constexpr,
):
    """Keys of one plane, [BLOCK_N, BLOCK_R]: token t of a page has the scale t // (S / GROUPS)."""
    if scale is None:
        numbers = stored
    else:
        numbers = plane_numbers(stored, PLANE, PAGE_SIZE // ROWS, IS_FLOAT8)
        group = (row + PLANE * ROWS) // (PAGE_SIZE // GROUPS)
        factor = load_rows(scale, page, group, is_row, channel, scale_strides, WIDTH)
        numbers = numbers * factor.to(tl.float32)
        if zero is not None:
            shift = load_rows(zero, page, group, is_row, channel, zero_strides, WIDTH)
            numbers = numbers + shift.to(tl.float32)
    return numbers


@triton.jit
def load_values(
    stored, scale, zero, scale_strides, zero_strides, page, row, is_row,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr, PLANE: tl.constexpr, IS_FLOAT8: tl.constexpr,
):
    """Values of one plane, [BLOCK_N, BLOCK_R]: channel d has the scale d // (r / GROUPS)."""
    if scale is None:
        numbers = stored
    else:
        numbers = plane_numbers(stored, PLANE, PAGE_SIZE // ROWS, IS_FLOAT8)
        # One scale for a whole token is loaded once and broadcast.
        group = tl.arange(0, BLOCK_R if GROUPS > 1 else 1) // (WIDTH // GROUPS)
        token = row + PLANE * ROWS
        factor = load_rows(scale, page, token, is_row, group, scale_strides, GROUPS)
        numbers = numbers * factor.to(tl.float32)
        if zero is not None:
            shift = load_rows(zero, page, token, is_row, group, zero_strides, GROUPS)
            numbers = numbers + shift.to(tl.float32)
    return numbers
