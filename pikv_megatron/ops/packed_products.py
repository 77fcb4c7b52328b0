"""Products with scaled pages, whose codes are multiplied as they are, on a CPU.

With x = q * scale + zero, a product with x is one with the codes q and a small one with the zero
points, if the other factor has the scales in it. A decode step has few rows, so scaling them costs
less than scaling every number of the pages, which is one pass over memory, and adding the zero
points is another.

Legend: n sequences, ng KV heads, c pages of a block, S tokens a page, t = c * S, r_k and r_v stored
widths, G_k groups of tokens and G_v of channels, R rows of a product.
"""

import torch

from pikv_megatron.ops.page_blocks import (
    PageBlock,
    listed_scales,
    read_codes,
    read_keys,
    read_values,
)
from pikv_megatron.ops.products import multiply
from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import PageList

# Every group of channels is one more product.
MOST_VALUE_GROUPS = 8


def multiply_keys(
    rows: torch.Tensor, page_list: PageList, block: PageBlock, out: torch.Tensor
) -> None:
    """Products of rows [ng * n, R, r_k] with the keys of a block, to out [ng * n, R, t].

    What is hidden may become anything.

    Example:
        One channel, q = 2, codes 0 and 3, scale 0.5, zero 1: keys 1 and 2.5. The row with its scale
        is 1, its products with the codes are 0 and 3; with the zero point 2: 2 and 5.
    """
    pages = page_list.pages
    if pages.key_scale is None or 2 * rows.shape[1] * pages.key_scale.shape[2] > pages.page_size:
        return multiply(rows, read_keys(page_list, block), out)
    codes = read_codes(pages.keys, pages.key_bits, page_list, block)
    scale = listed_scales(pages.key_scale, block)  # [ng, n, c, G_k, r_k]
    groups = codes.unflatten(3, (scale.shape[3], -1))
    by_sequence = rows.unflatten(0, scale.shape[:2])
    scaled = by_sequence[:, :, None, None] * scale.unsqueeze(4)
    shape = *groups.shape[:4], rows.shape[1], groups.shape[4]
    product = scratch("key products", shape, torch.float32, rows.device)
    torch.bmm(
        scaled.flatten(0, 3), groups.flatten(0, 3).transpose(1, 2), out=product.flatten(0, 3)
    )
    if pages.key_zero is not None:
        zero = listed_scales(pages.key_zero, block).flatten(2, 3)
        shift = by_sequence @ zero.transpose(2, 3)  # [ng, n, R, c * G_k]
        product += shift.unflatten(3, groups.shape[2:4]).permute(0, 1, 3, 4, 2).unsqueeze(5)
    by_group = out.unflatten(0, scale.shape[:2]).unflatten(3, (*groups.shape[2:4], -1))
    by_group.copy_(product.permute(0, 1, 4, 2, 3, 5))


def add_values(
    weights: torch.Tensor, page_list: PageList, block: PageBlock, dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """Add the products of weights [ng * n, R, t] with the values of a block to out, contiguous,
    [ng * n, R, r_v].

    Args:
        dtype: see `read_values`.
    """
    pages = page_list.pages
    scale = pages.value_scale
    if scale is None or not _folds_values(weights.shape[1], scale.shape[3], out.shape[2]):
        return multiply(weights, read_values(page_list, block, dtype), out, adds=True)
    codes = read_codes(pages.values, pages.value_bits, page_list, block)
    scales = _shown(scale, block)
    if not block.is_clean and pages.values.dtype == torch.float8_e4m3fn:
        codes.flatten(2, 3).masked_fill_(block.hidden.unsqueeze(-1), 0.0)
    heads = codes.flatten(0, 1).flatten(1, 2)
    by_channel = out.unflatten(2, (scales.shape[2], -1))
    for group, part in enumerate(heads.chunk(scales.shape[2], dim=2)):
        scaled = weights * scales[:, :, group].unsqueeze(1)
        if scales.shape[2] == 1:
            torch.baddbmm(out, scaled, part, out=out)
        else:
            by_channel[:, :, group] += torch.bmm(scaled, part)
    if pages.value_zero is not None:
        by_channel += (weights @ _shown(pages.value_zero, block)).unsqueeze(3)


def _folds_values(num_rows: int, num_groups: int, width: int) -> bool:
    return num_groups <= MOST_VALUE_GROUPS and 2 * num_rows * num_groups <= width


def _shown(pool: torch.Tensor, block: PageBlock) -> torch.Tensor:
    """Scales or zero points of values, [ng * n, t, G_v], 0 where they may be anything."""
    numbers = listed_scales(pool, block).flatten(2, 3)
    if not block.is_clean:
        numbers = numbers.masked_fill(block.hidden.unsqueeze(-1), 0.0)
    return numbers.flatten(0, 1)
