"""The exact k largest of many numbers, without a sort: columns in rising order.

Legend: n rows, m columns.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _keys(score, lens, column, num_columns):
    """Integers that rise with the scores, from 1; 0 where nothing is listed.

    The bits of a float that is not negative, read as an integer, rise with it.
    """
    mask = column < num_columns
    is_listed = tl.load(lens[0] + column * lens[1][0], mask=mask, other=0) > 0
    bits = tl.load(score + column, mask=mask, other=0.0).to(tl.uint32, bitcast=True)
    return tl.where(is_listed, bits + 1, 0).to(tl.int64)


@triton.jit
def _threshold(score, lens, num_columns, k, BLOCK: tl.constexpr):
    """The k-th largest key, hexadecimal digit by digit; 0 where fewer than k are listed.

    Example:
        Keys 0x25, 0x13, 0x21 and k = 2: 2 keys are at least 0x20 and 0 at least 0x30, so the first
        digit is 2; 2 are at least 0x21, 1 at least 0x22: the threshold is 0x21.
    """
    digit = tl.arange(0, 16).to(tl.int64)
    found = tl.zeros((1,), dtype=tl.int64)
    for place in range(8):
        candidate = found + (digit << (28 - 4 * place))
        count = tl.zeros((16,), dtype=tl.int32)
        for first in range(0, num_columns, BLOCK):
            key = _keys(score, lens, first + tl.arange(0, BLOCK), num_columns)
            count += tl.sum((key[:, None] >= candidate[None, :]).to(tl.int32), 0)
        # Candidates rise, so their counts fall: those that k keys reach come first.
        found += (tl.maximum(tl.sum((count >= k).to(tl.int64), 0), 1) - 1) << (28 - 4 * place)
    return found


@triton.jit
def _select(
    score, score_stride, lens, chosen, chosen_stride, num_columns, k, BLOCK: tl.constexpr
):
    """Program i: row i, in one pass over the columns once the threshold is known.

    Example:
        Scores 5, 7, 5, 9, 5 and k = 3: threshold 5, 2 scores above it, 1 place for a tie: column 0
        gets it; chosen 0, 1, 3.
    """
    row = tl.program_id(0).to(tl.int64)
    score += row * score_stride
    chosen += row * chosen_stride
    row_lens = (lens[0] + row * lens[1][0], (lens[1][1],))
    threshold = _threshold(score, row_lens, num_columns, k, BLOCK)
    above = 0
    for first in range(0, num_columns, BLOCK):
        key = _keys(score, row_lens, first + tl.arange(0, BLOCK), num_columns)
        above += tl.sum((key > threshold).to(tl.int32), 0)
    num_ties, num_chosen = 0, 0
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        key = _keys(score, row_lens, column, num_columns)
        is_tie = (key == threshold) & (key > 0)
        tie = num_ties + tl.cumsum(is_tie.to(tl.int32), 0)
        is_chosen = (key > threshold) | (is_tie & (tie <= k - above))
        place = num_chosen + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
        tl.store(chosen + place, column.to(tl.int64), mask=is_chosen)
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
        num_chosen += tl.sum(is_chosen.to(tl.int32), 0)


def select_topk(score: torch.Tensor, lens: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest scores among those with lens > 0.

    Args:
        score: [n, m], float32, contiguous, not negative.
        lens: [n, m], int32.
        k: at least 0.

    Returns:
        [n, k], int64, rising, the lower column first among equals; -1 behind them.
    """
    n, m = score.shape
    chosen = torch.full((n, k), -1, dtype=torch.int64, device=score.device)
    if n and m and k:
        block = min(BLOCK, triton.next_power_of_2(m))
        _select[(n,)](
            score, score.stride(0), (lens, lens.stride()), chosen, chosen.stride(0), m, k,
            BLOCK=block, num_warps=8,
        )
    return chosen
