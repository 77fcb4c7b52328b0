"""Attention over pages as wholes: `attend_means.cpp`."""

import torch

from pikv_kernels.cpu.fields import TYPES, pool_fields, row_fields
from pikv_kernels.cpu.compiled import call


def attend_means(
    logit: torch.Tensor, is_tail: torch.Tensor, mean_value: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention to pages by their logits [n, np, m] and mean values [ng, p, w].

    Args:
        is_tail: [n, m], bool, pages that count.
        table: [n, m], int64.

    Returns:
        out [n, 1, np, w], float32, and lse [n, 1, np].
    """
    n, num_heads, num_columns = logit.shape
    num_groups, _, width = mean_value.shape
    logit, is_tail = logit.contiguous(), is_tail.contiguous()
    out, lse = torch.empty(n, 1, num_heads, width), torch.empty(n, 1, num_heads)
    call("attend_means", [
        n, num_heads, num_groups, num_columns, width, TYPES[mean_value.dtype], logit.data_ptr(),
        is_tail.data_ptr(), *row_fields(table), *pool_fields(mean_value), out.data_ptr(),
        lse.data_ptr(),
    ])
    return out, lse
