"""Stored pages as numbers.

Legend: ng KV heads, p pages of the pool, c pages, S tokens and R stored rows a page, r a stored
width.
"""

import torch

from pikv_megatron.ops.packing import unpack
from pikv_megatron.types import KVPages


def expand_pages(pages: KVPages, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What pages stand for; attention never asks, tests and error reports do.

    Args:
        pages: the pool.
        page: [c], int64.

    Returns:
        Keys [ng, c, S, r_k] and values [ng, c, S, r_v], float32.
    """
    keys = _codes(pages.keys[:, page], pages.key_scale, pages.key_bits)
    if pages.key_scale is not None:
        groups = keys.unflatten(2, (pages.key_scale.shape[2], -1))
        keys = _scaled(groups, pages.key_scale, pages.key_zero, page, 3)
    if pages.values is None:
        return keys, keys[..., : pages.value_width]
    values = _codes(pages.values[:, page], pages.value_scale, pages.value_bits)
    if pages.value_scale is not None:
        groups = values.unflatten(3, (pages.value_scale.shape[3], -1))
        values = _scaled(groups, pages.value_scale, pages.value_zero, page, 4)
    return keys, values


def _codes(stored: torch.Tensor, scale: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Stored numbers as float32, not yet scaled."""
    is_packed = scale is not None and bits < 8
    return (unpack(stored, bits) if is_packed else stored).float()


def _scaled(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, page: torch.Tensor,
    dim: int,
) -> torch.Tensor:
    """Numbers whose groups lie along `dim`."""
    groups = groups * scale[:, page].float().unsqueeze(dim)
    if zero is not None:
        groups += zero[:, page].float().unsqueeze(dim)
    return groups.flatten(dim - 1, dim)
