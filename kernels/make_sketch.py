"""Makes what a home rank remembers of pages.

Legend: ng KV heads, c full buffers, S tokens a page, P tokens a byte, R = S / P byte rows, w width.
A tensor reaches a kernel as a pair: its pointer and its strides.
"""

import torch
import triton
import triton.language as tl

from pikv_kernels.packing import affine_codes, affine_range, pack, tile_tokens

TILE = 8192
MEAN: tl.constexpr = tl.constexpr(1)
BOX: tl.constexpr = tl.constexpr(2)
LOW_RANK: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_tile(x, head, item, token, channel, mask):
    """Places (token, channel) of x [ng, c, S, width] as float32, 0 where the mask is off."""
    base = x[0] + head.to(tl.int64) * x[1][0] + item.to(tl.int64) * x[1][1]
    rows = base + token.to(tl.int64)[:, None] * x[1][2]
    return tl.load(rows + channel[None, :] * x[1][3], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(x, head, page, channel, row, mask):
    """x[head, page, channel] = row, for x [ng, p, width]."""
    base = x[0] + head.to(tl.int64) * x[1][0] + page * x[1][1]
    tl.store(base + channel * x[1][2], row.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def store_tile(x, head, page, row, channel, tile, mask):
    """x[head, page, row, channel] = tile, for x [ng, p, rows, width]."""
    base = x[0] + head.to(tl.int64) * x[1][0] + page * x[1][1]
    rows = base + row.to(tl.int64)[:, None] * x[1][2]
    tl.store(rows + channel[None, :] * x[1][3], tile.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def write_sketch(
    keys, page, residual, first, second, third, norm, head, item, block, page_size, width,
    KIND: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Sketch channel block `block` of buffer `item` of head `head`.

    Example:
        Keys 1, 5, 3 of one channel: mean 3; box 1 to 5; 4 bits: zero 1, scale 4/15, codes 0, 15, 8
        (7.5 rounds to even).
    """
    place = tl.load(page + item)
    if place >= 0:
        token, is_token = tile_tokens(0, page_size // PLANES, PLANES, BLOCK_R)
        channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
        is_channel = channel < width
        inside = is_token[:, None] & is_channel[None, :]
        x = load_tile(keys, head, item, token, channel, inside)
        if KIND == MEAN:
            store_row(first, head, place, channel, tl.sum(x, 0) / page_size, is_channel)
        elif KIND == BOX:
            low = tl.min(tl.where(inside, x, float("inf")), 0)
            high = tl.max(tl.where(inside, x, float("-inf")), 0)
            store_row(first, head, place, channel, low, is_channel)
            store_row(second, head, place, channel, high, is_channel)
        else:
            LEVELS: tl.constexpr = 2 ** (8 // PLANES) - 1
            scale, zero = affine_range(x, inside, 0, LEVELS)
            store_row(second, head, place, channel, scale, is_channel)
            store_row(third, head, place, channel, zero, is_channel)
            codes = affine_codes(x, scale[None, :], zero[None, :], LEVELS)
            row = tl.arange(0, BLOCK_R)
            store_tile(first, head, place, row, channel, pack(codes, PLANES, BLOCK_R, BLOCK_C),
                       (row < page_size // PLANES)[:, None] & is_channel[None, :])
            if block == 0:
                _write_norm(residual, norm, head, item, place)


@triton.jit
def _write_norm(residual, norm, head, item, place):
    largest = float("inf")
    if residual is not None:
        largest = tl.load(residual[0] + head * residual[1][0] + item * residual[1][1])
    tl.store(norm[0] + head.to(tl.int64) * norm[1][0] + place * norm[1][1], largest)


@triton.jit
def _make_sketch(
    keys, page, residual, first, second, third, norm, page_size, width, KIND: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Program (i, h, b): channel block b of buffer i, head h."""
    write_sketch(
        keys, page, residual, first, second, third, norm, tl.program_id(1), tl.program_id(0),
        tl.program_id(2), page_size, width, KIND, PLANES, BLOCK_R, BLOCK_C,
    )


def make_sketch(
    keys: torch.Tensor, sketch: tuple, page: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    """As `pikv_megatron.ops.make_sketch.make_sketch`; negative pages are not written."""
    num_groups, num_items = keys.shape[:2]
    if num_items == 0:
        return
    arguments, blocks, constants = sketch_launch(keys, sketch, page, residual)
    _make_sketch[(num_items, num_groups, blocks)](*arguments, **constants)


def sketch_launch(
    keys: torch.Tensor, sketch: tuple, page: torch.Tensor, residual: torch.Tensor | None
) -> tuple[tuple, int, dict[str, int]]:
    """Arguments of `write_sketch` but for the program's own, channel blocks, and constants."""
    page_size, width = keys.shape[2:]
    if hasattr(sketch, "mean"):
        kind, parts, planes = MEAN, (sketch.mean,), 1
    elif hasattr(sketch, "low"):
        kind, parts, planes = BOX, (sketch.low, sketch.high), 1
    else:
        kind, parts = LOW_RANK, (sketch.codes, sketch.scale, sketch.zero, sketch.residual)
        planes = page_size // sketch.codes.shape[2]
    block_r, block_c = tile_shape(page_size, planes, width)
    pairs = [pair(part) for part in parts] + [None] * (4 - len(parts))
    arguments = (pair(keys), page.contiguous(), pair(residual), *pairs, page_size, width)
    constants = {
        "KIND": kind.value, "PLANES": planes, "BLOCK_R": block_r, "BLOCK_C": block_c,
    }
    return arguments, triton.cdiv(width, block_c), constants


def tile_shape(page_size: int, planes: int, width: int) -> tuple[int, int]:
    """BLOCK_R that holds a whole page, and as many channels as a tile takes beside it."""
    block_r = triton.next_power_of_2(page_size // planes)
    room = max(16, TILE // (block_r * planes))
    return block_r, min(room, triton.next_power_of_2(width))


def pair(tensor: torch.Tensor | None) -> tuple | None:
    """A tensor with its strides."""
    return None if tensor is None else (tensor, tensor.stride())
