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
    keys, values = (_codes(pool, page, pages) for pool in (pages.keys, pages.values))
    if pages.value_scale is None:
        return keys, values
    by_token = keys.unflatten(2, (pages.key_scale.shape[2], -1))
    by_channel = values.unflatten(3, (pages.value_scale.shape[3], -1))
    by_token *= pages.key_scale[:, page].float().unsqueeze(3)
    by_channel *= pages.value_scale[:, page].float().unsqueeze(4)
    if pages.value_zero is not None:
        by_token += pages.key_zero[:, page].float().unsqueeze(3)
        by_channel += pages.value_zero[:, page].float().unsqueeze(4)
    return by_token.flatten(2, 3), by_channel.flatten(3, 4)


def _codes(pool: torch.Tensor, page: torch.Tensor, pages: KVPages) -> torch.Tensor:
    stored = pool[:, page]
    if pages.tokens_per_row > 1:
        stored = unpack(stored, 8 // pages.tokens_per_row)
    return stored.float()
