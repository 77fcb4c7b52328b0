"""Merges partial attention by natural log-sum-exp.

Legend: k parts, n sequences, sq query tokens, np query heads, w output width, x = n * sq * np rows.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(
    out, lse, merged, total, num_parts, num_rows,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Merge the parts of one row, BLOCK_K of them at a time.

    The running maximum, sum and output are rescaled when a larger log-sum-exp appears, as in online
    softmax (Milakov and Gimelshein, 2018).

    Example:
        Parts (l = 0, o = 1), (l = log 3, o = 5), (l = -inf, o = NaN), BLOCK_K = 2. First block:
        maximum log 3, weights 1/3 and 1, sum 4/3, output 16/3. Second block: weight 0, and its
        output counts as 0. Result: o = (16/3) / (4/3) = 4, l = log 3 + log 4/3 = log 4.

    Args:
        out: [k, x, w].
        lse: [k, x], float32.
        merged: [x, w], written.
        total: [x], float32, written.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_W)
    top = tl.full([1], -float("inf"), tl.float32)
    weight_sum = tl.full([1], 0.0, tl.float32)
    acc = tl.full([BLOCK_W], 0.0, tl.float32)
    for first in range(0, num_parts, BLOCK_K):
        part = first + tl.arange(0, BLOCK_K)
        place = part.to(tl.int64) * num_rows + row
        logs = tl.load(lse + place, mask=part < num_parts, other=-float("inf"))
        has_keys = logs > -float("inf")
        new_top = tl.maximum(top, tl.max(logs, 0))
        # Without any key so far, every weight is exp(-inf - 0) = 0.
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp(logs - anchor)
        numbers = tl.load(
            out + place[:, None] * WIDTH + channel[None, :],
            mask=has_keys[:, None] & (channel < WIDTH)[None, :], other=0.0,
        ).to(tl.float32)
        rescale = tl.exp(top - anchor)
        acc = acc * rescale + tl.sum(numbers * weight[:, None], 0)
        weight_sum = weight_sum * rescale + tl.sum(weight, 0)
        top = new_top
    is_empty = top == -float("inf")
    divisor = tl.where(is_empty, 1.0, weight_sum)
    result = (acc / divisor).to(merged.dtype.element_ty)
    tl.store(merged + row * WIDTH + channel, result, mask=channel < WIDTH)
    tl.store(total + row + tl.arange(0, 1), tl.where(is_empty, top, top + tl.log(divisor)))


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge k parts: l = logsumexp_i(l_i), o = sum_i exp(l_i - l) o_i, in float32.

    Args:
        out: [k, n, sq, np, w], any number of parts and any width; parts whose `lse` is -inf are not
            read.
        lse: [k, n, sq, np], float32.
        dtype: of the merged output; that of the parts by default.

    Returns:
        [n, sq, np, w] and [n, sq, np], float32.
    """
    num_parts, *rows, width = out.shape
    merged = torch.empty((*rows, width), dtype=dtype or out.dtype, device=out.device)
    total = torch.empty(rows, dtype=torch.float32, device=out.device)
    if total.numel() == 0:
        return merged, total
    _merge[(total.numel(),)](
        out.contiguous(), lse.contiguous(), merged, total, num_parts, total.numel(),
        WIDTH=width, BLOCK_W=triton.next_power_of_2(width), BLOCK_K=16,
    )
    return merged, total
