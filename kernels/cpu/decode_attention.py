"""Attention of a few queries over the pages of several lists: `decode_attention.cpp`."""

from collections.abc import Sequence
from typing import Any

import torch

from pikv_kernels.cpu.fields import address, page_fields, row_fields
from pikv_kernels.cpu.compiled import call


def decode_attention(
    query: torch.Tensor, lists: Sequence[Any], softmax_scale: float, with_mass: bool = False
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor] | None]:
    """Softmax attention of query [n, sq, np, r_k] over all tokens that the page lists name.

    Args:
        lists: `PageList`s, one or more.

    Returns:
        (out [n, sq, np, r_v] in the query's type, lse [n, sq, np] float32), and the masses
        [n, sq, np, m] of each list's pages if asked for.
    """
    shape, pages = query.shape[:3], lists[0].pages
    rows = query.float().contiguous()
    out = torch.empty(*shape, pages.value_width)
    lse = torch.empty(shape)
    masses = [torch.empty(*shape, each.table.shape[1]) for each in lists] if with_mass else None
    kept = [
        [None if x is None else x.contiguous() for x in (each.token_mask, each.logit_bias)]
        for each in lists
    ]
    fields = [
        *shape, pages.keys.shape[0], query.shape[3], out.shape[3],
        rows.data_ptr(), out.data_ptr(), lse.data_ptr(), len(lists),
    ]
    for each, own, mass in zip(lists, kept, masses or [None] * len(lists)):
        fields += page_fields(each.pages)
        fields += row_fields(each.table) + row_fields(each.lens)
        fields += [each.table.shape[1], *map(address, own), address(mass)]
        fields += _turn_fields(each.turn)
    call("decode_attention", fields, softmax_scale)
    return (out.to(query.dtype), lse), masses


def _turn_fields(turn: Any | None) -> list[int]:
    """Of a `KeyTurn`."""
    if turn is None:
        return [0] * 6
    assert turn.position.is_contiguous() and turn.angles.is_contiguous()
    return [
        turn.position.data_ptr(), *row_fields(turn.rows), turn.angles.data_ptr(), *turn.angles.shape
    ]
