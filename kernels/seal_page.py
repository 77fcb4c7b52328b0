"""Compresses full token buffers into pages: keys, values and sketch in one launch.

Legend: ng KV heads, c full buffers, S tokens a page, P planes of a tile (tokens a byte; 8 for 3
bits), R = S / P rows, G_k groups of tokens (keys) and G_v of channels (values) with one scale each.
A tensor reaches a kernel as a pair: its pointer and its strides. FORMAT is 0 for plain numbers, 1
for float8, else the bits of a code.
"""

import torch
import triton
import triton.language as tl

from pikv_kernels.make_sketch import (
    TILE,
    load_tile,
    pair,
    sketch_launch,
    store_tile,
    tile_shape,
    write_sketch,
)
from pikv_kernels.packing import (
    float8_codes,
    float8_scale,
    pack,
    pack_low,
    packing_of,
    quantised,
    tile_tokens,
)

PLAIN: tl.constexpr = tl.constexpr(0)
FLOAT8: tl.constexpr = tl.constexpr(1)


@triton.jit
def _encoded(x, inside, AXIS: tl.constexpr, FORMAT: tl.constexpr):
    """Codes, and their scale and zero point along AXIS."""
    if FORMAT == FLOAT8:
        scale = float8_scale(x, inside, AXIS)
        return float8_codes(x, tl.expand_dims(scale, AXIS)), scale, scale * 0.0
    else:
        return quantised(x, inside, AXIS, FORMAT)


@triton.jit
def _store_codes(
    out, head, place, row, num_rows, channel, is_channel, codes, FORMAT: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Pack a tile of codes, or take plain numbers, and store it."""
    inside = (row < num_rows)[:, None] & is_channel[None, :]
    if FORMAT <= FLOAT8:
        store_tile(out, head, place, row, channel, codes, inside)
    elif FORMAT == 3:
        for half in tl.static_range(2):
            low = pack_low(codes, half, BLOCK_R, BLOCK_C)
            store_tile(out, head, place, half * num_rows + row, channel, low, inside)
        high = pack(codes >> 2, PLANES, BLOCK_R, BLOCK_C)
        store_tile(out, head, place, 2 * num_rows + row, channel, high, inside)
    else:
        store_tile(out, head, place, row, channel, pack(codes, PLANES, BLOCK_R, BLOCK_C), inside)


@triton.jit
def _store_scale(out, head, place, token, group, scale, mask):
    """out[head, place, token, group] = scale, token and group of the same shape."""
    base = out[0] + head.to(tl.int64) * out[1][0] + place * out[1][1]
    tl.store(base + token * out[1][2] + group * out[1][3], scale.to(out[0].dtype.element_ty),
             mask=mask)


@triton.jit
def _seal_keys(
    keys, out, scales, zeros, place, head, item, block, page_size, width, num_groups,
    FORMAT: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One block of channels of all tokens: a scale for each channel and group of tokens.

    Example:
        S = 4, G_k = 2, two bits, tokens 0, 3, 10, 16: scales 1 and 2, zeros 0 and 10, codes
        0, 3, 0, 3, one byte 0 + 3 * 4 + 0 * 16 + 3 * 64 = 204.
    """
    token, is_token = tile_tokens(0, page_size // PLANES, PLANES, BLOCK_R)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < width
    inside = is_token[:, None] & is_channel[None, :]
    x = load_tile(keys, head, item, token, channel, inside)
    row = tl.arange(0, BLOCK_R)
    if FORMAT == PLAIN:
        _store_codes(out, head, place, row, page_size, channel, is_channel, x, FORMAT, PLANES,
                     BLOCK_R, BLOCK_C)
    else:
        codes = tl.zeros([PLANES * BLOCK_R, BLOCK_C], tl.int32)
        for group in range(num_groups):
            is_mine = (token // (page_size // num_groups) == group)[:, None]
            own, scale, zero = _encoded(x, inside & is_mine, 0, FORMAT)
            codes = tl.where(is_mine, own, codes)
            _store_scale(scales, head, place, group, channel, scale, is_channel)
            if FORMAT > FLOAT8:
                _store_scale(zeros, head, place, group, channel, zero, is_channel)
        _store_codes(out, head, place, row, page_size // PLANES, channel, is_channel, codes, FORMAT,
                     PLANES, BLOCK_R, BLOCK_C)


@triton.jit
def _seal_values(
    values, out, scales, zeros, place, head, item, block, page_size, group_width, row_blocks,
    FORMAT: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One group of channels of a block of byte rows: a scale for each token.

    Example:
        One token, G_v = 2, two bits, channels 0, 3, 10, 16: scales 1 and 2, zeros 0 and 10.
    """
    num_rows = page_size // PLANES
    group, first_row = block // row_blocks, block % row_blocks * BLOCK_R
    token, is_token = tile_tokens(first_row, num_rows, PLANES, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < group_width
    channel += group * group_width
    inside = is_token[:, None] & is_channel[None, :]
    x = load_tile(values, head, item, token, channel, inside)
    codes = x
    if FORMAT != PLAIN:
        codes, scale, zero = _encoded(x, inside, 1, FORMAT)
        _store_scale(scales, head, place, token, group, scale, is_token)
        if FORMAT > FLOAT8:
            _store_scale(zeros, head, place, token, group, zero, is_token)
    row = first_row + tl.arange(0, BLOCK_R)
    _store_codes(out, head, place, row, num_rows, channel, is_channel, codes, FORMAT, PLANES,
                 BLOCK_R, BLOCK_C)


@triton.jit
def _seal(
    keys, values, page, out_keys, out_values, key_scale, key_zero, value_scale, value_zero,
    page_size, key_width, key_groups, key_blocks, group_width, row_blocks, value_blocks,
    sketch_arguments, KEY: tl.constexpr, VALUE: tl.constexpr, SKETCH: tl.constexpr,
):
    """Program (i, h, b): part b of buffer i, head h; parts are keys, then values, then sketch.

    KEY and VALUE are FORMAT, PLANES, BLOCK_R and BLOCK_C.

    Example:
        2 key blocks, 4 value blocks, 1 sketch block: parts 0 1 | 2 3 4 5 | 6.
    """
    item, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.load(page + item)
    if (part < key_blocks) & (place >= 0):
        _seal_keys(keys, out_keys, key_scale, key_zero, place, head, item, part, page_size,
                   key_width, key_groups, KEY[0], KEY[1], KEY[2], KEY[3])
    part -= key_blocks
    if (part >= 0) & (part < value_blocks) & (place >= 0):
        _seal_values(values, out_values, value_scale, value_zero, place, head, item, part,
                     page_size, group_width, row_blocks, VALUE[0], VALUE[1], VALUE[2], VALUE[3])
    if SKETCH is not None:
        part -= value_blocks
        if part >= 0:
            x, rows, residual, first, second, third, norm, size, width = sketch_arguments
            write_sketch(x, rows, residual, first, second, third, norm, head, item, part, size,
                         width, SKETCH[0], SKETCH[1], SKETCH[2], SKETCH[3])


def seal_page(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    pages: tuple,
    page: torch.Tensor,
    sketch: tuple | None = None,
    sketch_page: torch.Tensor | None = None,
    sketch_keys: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """As `pikv_megatron.ops.seal_page.seal_page`; negative pages are not written."""
    num_groups, num_items = keys.shape[:2]
    if num_items == 0:
        return
    stored = pages
    if values is None:  # columns of the keys: no part is theirs
        values, stored = keys, pages._replace(values=pages.keys)
    sizes, constants = _tiling(keys, values, stored)
    if stored is not pages:
        sizes["value_blocks"] = 0
    arguments, num_parts, sketch_constants = None, sizes["key_blocks"] + sizes["value_blocks"], None
    if sketch is not None:
        sketch_keys = keys if sketch_keys is None else sketch_keys
        sketch_page = page if sketch_page is None else sketch_page
        arguments, num_blocks, kind = sketch_launch(sketch_keys, sketch, sketch_page, residual)
        num_parts += num_blocks
        sketch_constants = tuple(kind.values())
    pool = [_bits(stored.keys), _bits(stored.values), *stored[2:6]]
    _seal[(num_items, num_groups, num_parts)](
        pair(keys), pair(values), page.contiguous(), *map(pair, pool), **sizes,
        sketch_arguments=arguments, **constants, SKETCH=sketch_constants,
    )


def _tiling(
    keys: torch.Tensor, values: torch.Tensor, pages: tuple
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Sizes and constants of `_seal`: a tile has a page of keys or a group of values."""
    page_size, key_width = keys.shape[2:]
    key_format, key_planes = _format(pages.keys, pages.key_scale, page_size)
    value_format, value_planes = _format(pages.values, pages.value_scale, page_size)
    value_groups = 1 if pages.value_scale is None else pages.value_scale.shape[3]
    group_width, num_rows = values.shape[3] // value_groups, page_size // value_planes
    key_r, key_c = tile_shape(page_size, key_planes, key_width)
    value_c = triton.next_power_of_2(group_width)
    value_r = min(triton.next_power_of_2(num_rows), max(1, TILE // (value_c * value_planes)))
    row_blocks = triton.cdiv(num_rows, value_r)
    sizes = {
        "page_size": page_size, "key_width": key_width,
        "key_groups": 1 if pages.key_scale is None else pages.key_scale.shape[2],
        "key_blocks": triton.cdiv(key_width, key_c), "group_width": group_width,
        "row_blocks": row_blocks, "value_blocks": value_groups * row_blocks,
    }
    return sizes, {
        "KEY": (key_format, key_planes, key_r, key_c),
        "VALUE": (value_format, value_planes, value_r, value_c),
    }


def _format(
    numbers: torch.Tensor, scale: torch.Tensor | None, page_size: int
) -> tuple[int, int]:
    """FORMAT and the planes of a tile that is sealed."""
    kind, planes = packing_of(numbers, scale, page_size)
    return kind, 8 if kind == 3 else planes


def _bits(pool: torch.Tensor) -> torch.Tensor:
    """float8 pages as bytes: the kernel makes their bits itself."""
    return pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool
