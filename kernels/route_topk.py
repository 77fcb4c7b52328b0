"""Which shards a query visits: gate, penalty and top-k in one launch.

Legend: n queries, N shards, h width of the gate. A tensor reaches a kernel as a pair: its pointer
and its strides.
"""

import torch
import triton
import triton.language as tl

# Of the gate: numbers of a tile, and channels of it at most.
TILE = 4096
BLOCK_H = 64


@triton.jit
def _keys(logits, is_shard):
    """Integers in [0, 2^32) that rise with the logits; NaN counts as -inf, -1 marks no shard.

    The bits of a float that is not negative rise with it, and those of a negative one fall.
    """
    logits = tl.where(logits == logits, logits, float("-inf"))
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.uint32, bitcast=True).to(tl.int64)  # no -0
    key = tl.where(bits < 2**31, bits + 2**31, 2**32 - 1 - bits)
    return tl.where(is_shard, key, -1)


@triton.jit
def _threshold(key, k):
    """The k-th largest key, hexadecimal digit by digit; 0 where there are fewer than k.

    A tile of all pairs of shards would not fit in registers; one of 16 digits does.

    Example:
        Keys 0x25, 0x13, 0x21 and k = 2: 2 keys are at least 0x20 and 0 at least 0x30, so the first
        digit is 2; 2 are at least 0x21, 1 at least 0x22: the threshold is 0x21.
    """
    digit = tl.arange(0, 16).to(tl.int64)
    found = tl.zeros((1,), dtype=tl.int64)
    for place in range(8):
        candidate = found + (digit << (28 - 4 * place))
        count = tl.sum((key[:, None] >= candidate[None, :]).to(tl.int32), 0)
        # Candidates rise, so their counts fall: those that k keys reach come first.
        found += (tl.maximum(tl.sum((count >= k).to(tl.int64), 0), 1) - 1) << (28 - 4 * place)
    return found


@triton.jit
def _route(
    x, penalty, gate, visited, num_shards, width, k, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Program i: query i.

    Example:
        Logits 1, 3, 2, 2 and k = 2: the threshold is 2, one shard is above it, and one place is
        left for shard 2, the first that equals it: 1 and 2 are visited.
    """
    row = tl.program_id(0).to(tl.int64)
    shard = tl.arange(0, BLOCK_N)
    is_shard = shard < num_shards
    start = x[0] + row * x[1][0]
    if gate is None:
        logits = tl.load(start + shard * x[1][1], mask=is_shard, other=0.0).to(tl.float32)
    else:
        logits = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, width, BLOCK_H):
            channel = first + tl.arange(0, BLOCK_H)
            part = tl.load(start + channel * x[1][1], mask=channel < width, other=0.0)
            weight = tl.load(
                gate[0] + shard[:, None] * gate[1][0] + channel[None, :] * gate[1][1],
                mask=is_shard[:, None] & (channel < width)[None, :], other=0.0,
            )
            logits += tl.sum(weight.to(tl.float32) * part.to(tl.float32)[None, :], 1)
    logits -= tl.load(penalty[0] + row * penalty[1][0] + shard * penalty[1][1], mask=is_shard,
                      other=0.0).to(tl.float32)
    key = _keys(logits, is_shard)
    threshold = _threshold(key, k)
    is_above, is_tie = key > threshold, key == threshold
    num_left = k - tl.sum(is_above.to(tl.int32), 0)
    is_visited = is_above | (is_tie & (tl.cumsum(is_tie.to(tl.int32), 0) <= num_left))
    tl.store(visited + row * num_shards + shard, is_visited, mask=is_shard)


def route_topk(
    x: torch.Tensor, penalty: torch.Tensor, k: int, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """As `pikv_megatron.ops.route_topk.route_topk`, for arguments that it has checked."""
    num_rows, width = x.shape
    num_shards = width if gate is None else gate.shape[0]
    visited = torch.empty(num_rows, num_shards, dtype=torch.bool, device=x.device)
    if visited.numel():
        penalty = penalty.expand(num_rows, num_shards)
        block = triton.next_power_of_2(num_shards)
        _route[(num_rows,)](
            (x, x.stride()), (penalty, penalty.stride()),
            None if gate is None else (gate, gate.stride()), visited, num_shards, width, k,
            BLOCK_N=block, BLOCK_H=min(BLOCK_H, TILE // block), num_warps=8 if block > 256 else 4,
        )
    return visited
