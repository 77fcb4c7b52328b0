"""Which shards a query visits: gate, penalty and top-k in one launch.

Legend: n queries, N shards, h width of the gate. A tensor reaches a kernel as a pair: its pointer
and its strides.
"""

import torch
import triton
import triton.language as tl

BLOCK_H = 64


@triton.jit
def _route(
    x, penalty, gate, visited, num_shards, width, k, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Program i: query i. A shard's rank is the number of shards that go before it.

    Example:
        Logits 1, 3, 2, 2: ranks 3, 0, 1, 2, shard 2 before shard 3; k = 2 visits 1 and 2.
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
    logits = tl.where(is_shard & (logits == logits), logits, float("-inf"))
    # Shards that are none come last: they equal -inf at most, and their numbers are higher.
    is_before = (logits[None, :] > logits[:, None]) | (
        (logits[None, :] == logits[:, None]) & (shard[None, :] < shard[:, None])
    )
    rank = tl.sum(is_before.to(tl.int32), 1)
    tl.store(visited + row * num_shards + shard, rank < k, mask=is_shard)


def route_topk(
    x: torch.Tensor, penalty: torch.Tensor, k: int, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """As `pikv_megatron.ops.route_topk.route_topk`, for arguments that it has checked."""
    num_rows, width = x.shape
    num_shards = width if gate is None else gate.shape[0]
    visited = torch.empty(num_rows, num_shards, dtype=torch.bool, device=x.device)
    if visited.numel():
        penalty = penalty.expand(num_rows, num_shards)
        _route[(num_rows,)](
            (x, x.stride()), (penalty, penalty.stride()),
            None if gate is None else (gate, gate.stride()), visited, num_shards, width, k,
            BLOCK_N=triton.next_power_of_2(num_shards), BLOCK_H=BLOCK_H,
        )
    return visited
