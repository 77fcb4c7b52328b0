"""Writes tokens into open pages: keys and values in one launch.

Legend: ng KV heads, t tokens, p pages of the pool, S tokens a page, w_k and w_v widths. A tensor
reaches a kernel as a pair: its pointer and its strides.
"""

import torch
import triton
import triton.language as tl

BLOCK_T = 16


@triton.jit
def _copy(source, pool, head, token, page, offset, is_kept, width, BLOCK: tl.constexpr):
    """Rows `token` of source [ng, t, width] -> places (page, offset) of pool [ng, p, S, width]."""
    x, x_strides = source
    out, out_strides = pool
    channel = tl.arange(0, BLOCK)
    mask = is_kept[:, None] & (channel < width)[None, :]
    rows = x + head * x_strides[0] + token.to(tl.int64) * x_strides[1]
    tile = tl.load(rows[:, None] + channel[None, :] * x_strides[2], mask=mask)
    places = out + head * out_strides[0] + page * out_strides[1] + offset * out_strides[2]
    tl.store(
        places[:, None] + channel[None, :] * out_strides[3],
        tile.to(out.dtype.element_ty), mask=mask,
    )


@triton.jit
def _append(
    keys, values, pool_keys, pool_values, page, offset, num_tokens, key_width, value_width,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Program (i, h): tokens i * BLOCK_T ... of head h.

    Example:
        Two heads, 40 tokens, BLOCK_T = 16: programs (0..2, 0..1); (2, 1) copies tokens 32 to 39
        of head 1; one of them with page -1 is skipped, one with page 7, offset 3 lands there.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    is_token = token < num_tokens
    place = tl.load(page + token, mask=is_token, other=-1)
    row = tl.load(offset + token, mask=is_token, other=0)
    is_kept = place >= 0
    _copy(keys, pool_keys, head, token, place, row, is_kept, key_width, BLOCK_K)
    if values is not None:
        _copy(values, pool_values, head, token, place, row, is_kept, value_width, BLOCK_V)


def append_kv(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor | None,
    page: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """As `pikv_megatron.ops.append_kv.append_kv`; tokens whose page is negative are not written."""
    num_groups, num_tokens, key_width = keys.shape
    if num_tokens == 0:
        return
    value_width = key_width if values is None else values.shape[2]
    pairs = [
        None if t is None else (t, t.stride()) for t in (keys, values, pool_keys, pool_values)
    ]
    _append[(triton.cdiv(num_tokens, BLOCK_T), num_groups)](
        *pairs, page.contiguous(), offset.contiguous(), num_tokens, key_width, value_width,
        BLOCK_T=BLOCK_T, BLOCK_K=triton.next_power_of_2(key_width),
        BLOCK_V=triton.next_power_of_2(value_width),
    )
