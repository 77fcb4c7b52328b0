"""Tiles of stored pages, dequantised in registers: the `KVPages` layout, seen from a kernel.

Legend: S tokens a page, P planes, ROWS = S / P, r a stored width.

Lane j of a tile stands for the tokens j, j + ROWS, j + 2 ROWS, ..., one in each plane. Where a
stored row has that many tokens, those are its tokens, and it is loaded once for all planes.

FORMAT is 0 for plain numbers, 1 for float8, else the bits of a code.
"""

import triton
import triton.language as tl

# Of `ops.turn_keys`.
NEAR: tl.constexpr = tl.constexpr(64)


@triton.jit
def load_rows(pool, page, row, is_row, channel, strides, WIDTH: tl.constexpr):
    """[BLOCK_N, BLOCK_R] of a pool [p, rows, r] as stored, 0 outside.

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
def load_high(
    pool, page, row, is_row, channel, strides, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The rows that have the highest bits of numbers of 3 bits; nothing for others."""
    if FORMAT == 3:
        return load_rows(
            pool, page, ROWS + row % (ROWS // 2), is_row, channel, strides, WIDTH
        )
    else:
        return None


@triton.jit
def plane_numbers(
    stored, high, row, PLANE: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr
):
    """The numbers of one plane of stored rows, float32, not yet scaled.

    Example:
        Two bits, P = 4: the byte 99 = 3 + 0 * 4 + 2 * 16 + 1 * 64 is 3, 0, 2, 1 in planes 0 to 3.
        Three bits, S = 16, ROWS = 4: row 3 has the tokens 3, 7, 11 and 15. Their highest bits are
        in row 4 + 3 % 2, which has the tokens 1, 3, 5, ..., as its bits 1, 3, 5 and 7.
        Float8 e4m3, byte 0x38 = 0 0111 000 is 1. As float16, its bits are 0 00111 0000000000, which
        is 2^(7 - 15) = 2^-8: the two exponents are biased by 7 and by 15. 2^-8 * 256 = 1.
    """
    if FORMAT == 1:
        # Done by hand, since compilers have the conversion for some architectures only.
        wide = stored.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif FORMAT == 3:
        codes = (stored >> (PLANE * 2)) & 3
        shift = 2 * PLANE + row // (ROWS // 2)
        codes = codes + ((high.to(tl.int32) >> shift[:, None]) & 1).to(tl.uint8) * 4
        numbers = codes.to(tl.float32)
    else:
        numbers = ((stored >> (PLANE * FORMAT)) & (2**FORMAT - 1)).to(tl.float32)
    return numbers


@triton.jit
def scale_keys(
    numbers, scale, zero, scale_strides, zero_strides, page, token, is_row, channel,
    WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUPS: tl.constexpr,
):
    """[BLOCK_N, BLOCK_R]: token t of a page has the scale t // (S / GROUPS)."""
    group = token // (PAGE_SIZE // GROUPS)
    factor = load_rows(scale, page, group, is_row, channel, scale_strides, WIDTH)
    numbers = numbers * factor.to(tl.float32)
    if zero is not None:
        shift = load_rows(zero, page, group, is_row, channel, zero_strides, WIDTH)
        numbers = numbers + shift.to(tl.float32)
    return numbers


@triton.jit
def key_numbers(
    stored, high, scale, zero, scale_strides, zero_strides, page, row, token, is_row, channel,
    PLANE: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, GROUPS: tl.constexpr,
):
    """The keys of one plane of stored rows."""
    if FORMAT > 0:
        numbers = plane_numbers(stored, high, row, PLANE, ROWS, FORMAT)
        numbers = scale_keys(
            numbers, scale, zero, scale_strides, zero_strides, page, token, is_row, channel,
            WIDTH, PAGE_SIZE, GROUPS,
        )
    else:
        numbers = stored
    return numbers


@triton.jit
def partner_of(channel, TURNED: tl.constexpr):
    """The channel that RoPE turns each channel with; those from TURNED on stay as they are.

    Example:
        TURNED = 4: 2, 3, 0, 1, 4, 5.
    """
    HALF: tl.constexpr = TURNED // 2
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    return tl.where(channel < TURNED, partner, channel)


@triton.jit
def turn_keys(
    numbers, partners, position, row, angles, num_far, token, is_row, channel,
    TURNED: tl.constexpr, PAGE_SIZE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_R] keys that are stored before RoPE, at their positions.

    Args:
        partners: [BLOCK_N, BLOCK_R], the numbers of `partner_of` the channels.
        position: pointer to [q, S], int32.
        row: [BLOCK_N], of `position`, for each page.
        angles: pointer to [num_far + NEAR, TURNED], cosines and sines: `ops.turn_keys.angle_table`.
    """
    HALF: tl.constexpr = TURNED // 2
    place = tl.load(position + row.to(tl.int64) * PAGE_SIZE + token, mask=is_row, other=0)
    inside = is_row[:, None] & (channel < TURNED)[None, :]
    plane = (channel % HALF)[None, :]
    far = angles + (place // NEAR)[:, None] * TURNED + plane
    near = angles + (num_far + place % NEAR)[:, None] * TURNED + plane
    far_cos = tl.load(far, mask=inside, other=1.0)
    far_sin = tl.load(far + HALF, mask=inside, other=0.0)
    near_cos = tl.load(near, mask=inside, other=1.0)
    near_sin = tl.load(near + HALF, mask=inside, other=0.0)
    cos = far_cos * near_cos - far_sin * near_sin
    sin = far_sin * near_cos + far_cos * near_sin
    sin = tl.where((channel < HALF)[None, :], -sin, sin)
    return numbers.to(tl.float32) * cos + partners.to(tl.float32) * sin


@triton.jit
def scale_values(
    numbers, scale, zero, scale_strides, zero_strides, page, token, is_row,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, GROUPS: tl.constexpr,
):
    """[BLOCK_N, BLOCK_R]: channel d has the scale d // (r / GROUPS)."""
    # One scale for a whole token is loaded once and broadcast.
    group = tl.arange(0, BLOCK_R if GROUPS > 1 else 1) // (WIDTH // GROUPS)
    factor = load_rows(scale, page, token, is_row, group, scale_strides, GROUPS)
    numbers = numbers * factor.to(tl.float32)
    if zero is not None:
        shift = load_rows(zero, page, token, is_row, group, zero_strides, GROUPS)
        numbers = numbers + shift.to(tl.float32)
    return numbers
