"""Compresses full token buffers into pages.

Legend: ng KV heads, c full buffers, p pages of the pool, S tokens a page, r_k and r_v stored
widths, w width of what is sketched, G_k and G_v scales along tokens (keys) and channels (values).
"""

import torch

from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.packing import pack, quantise, quantise_float8
from pikv_megatron.types import KVPages, PageSketch


def seal_page(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    pages: KVPages,
    page: torch.Tensor,
    sketch: PageSketch | None = None,
    sketch_page: torch.Tensor | None = None,
    sketch_keys: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Quantise and pack buffer i, write it to page[i] of the pool, in place, and sketch it.

    What keys and values are stored as is read off `pages`: plain, float8 or 8, 4, 3 or 2 bits. Keys
    are quantised per channel, values per token, each in groups (KIVI, arXiv 2402.02750).
    `log_multiplicity` is the caller's.

    The sketch is the same as `make_sketch` makes; here it costs no launch of its own. Both exist
    because a page may be sealed on one rank and remembered on another.

    Args:
        keys: [ng, c, S, r_k], any floating dtype and strides.
        values: [ng, c, S, r_v]; None where they are columns of the keys.
        pages: the pool; its last page is a null page, whose content nobody reads.
        page: [c], int64; negative loses the page.
        sketch: the sketches to write to; None: no sketch is made.
        sketch_page: [c], int64, rows of `sketch`; None: `page`.
        sketch_keys: [ng, c, S, w], what is sketched; None: `keys`.
        residual: [ng, c], see `make_sketch`.
    """
    kernel = kernel_op("seal_page", keys)
    if kernel is not None:
        return kernel(keys, values, pages, page, sketch, sketch_page, sketch_keys, residual)
    place = torch.where(page < 0, pages.keys.shape[1] - 1, page)
    for name, part in _encode(keys, values, pages).items():
        pool = getattr(pages, name)
        pool[:, place] = part.to(pool.dtype)
    if sketch is not None:
        row = page if sketch_page is None else sketch_page
        make_sketch(keys if sketch_keys is None else sketch_keys, sketch, row, residual)


def _encode(
    keys: torch.Tensor, values: torch.Tensor | None, pages: KVPages
) -> dict[str, torch.Tensor]:
    """The fields of `KVPages` for these buffers, each [ng, c, ...]."""
    parts = {"keys": keys} if values is None else {"keys": keys, "values": values}
    if pages.key_scale is not None:
        groups = keys.unflatten(2, (pages.key_scale.shape[2], -1))
        parts |= _quantised("key", groups, 3, None if pages.key_zero is None else pages.key_bits)
    if pages.value_scale is not None:
        groups = values.unflatten(3, (pages.value_scale.shape[3], -1))
        bits = None if pages.value_zero is None else pages.value_bits
        parts |= _quantised("value", groups, 4, bits)
    return parts


def _quantised(
    name: str, groups: torch.Tensor, dim: int, bits: int | None
) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points of groups that lie along `dim`; None bits: float8."""
    if bits is None:
        codes, scale = quantise_float8(groups, dim)
        return {f"{name}s": codes.flatten(dim - 1, dim), f"{name}_scale": scale.squeeze(dim)}
    codes, scale, zero = quantise(groups, bits, dim)
    codes = codes.flatten(dim - 1, dim)
    return {
        f"{name}s": codes if bits == 8 else pack(codes, bits),
        f"{name}_scale": scale.squeeze(dim), f"{name}_zero": zero.squeeze(dim),
    }
