"""Writes tokens into open pages.

Legend: ng KV heads, t tokens, p pages of the pool, S tokens a page, w_k and w_v widths.
"""

import torch

from pikv_megatron.ops.backend import kernel_op


def append_kv(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor | None,
    page: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Write token i to place offset[i] of page[i], in place.

    The pool's last page is a null page, whose content nobody reads: the tokens whose page is -1
    are lost there (or nowhere), so nothing is read back from the device.

    Args:
        keys: [ng, t, w_k], of any strides.
        values: [ng, t, w_v]; None where they are columns of the keys.
        pool_keys: [ng, p, S, w_k], any floating dtype: tokens are cast to it.
        pool_values: [ng, p, S, w_v]; None likewise.
        page: [t], int64; -1 loses the token. A (page, offset) is named once, or in the null page.
        offset: [t], int64, in [0, S).
    """
    kernel = kernel_op("append_kv", keys)
    if kernel is not None:
        return kernel(keys, values, pool_keys, pool_values, page, offset)
    pool_keys[:, page, offset] = keys.to(pool_keys.dtype)  # -1 counts from the end
    if values is not None:
        pool_values[:, page, offset] = values.to(pool_values.dtype)
