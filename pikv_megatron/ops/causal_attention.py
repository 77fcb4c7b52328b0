"""Attention of a chunk of tokens to itself, sequence by sequence.

There is no Triton kernel: torch's own flash attention is the implementation, on CPUs and GPUs.

Legend: t tokens of all sequences, one sequence behind the other, np query heads, ng KV heads,
g = np / ng, hn key width, w_v value width, s tokens of one sequence.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.types import AttentionState

# Where flash attention does not serve, queries go in blocks, so that the logits stay small.
QUERY_BLOCK = 256
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the GPU's flash attention asks of a width beyond what `can_use_flash_attention` does.
GPU_WIDTH_STEP = 8


@torch.no_grad()
def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lens: Sequence[int],
    softmax_scale: float,
) -> AttentionState:
    """Every token attends to its own sequence's tokens up to itself.

    Memory beside the result grows with the tokens, never with their square.

    Args:
        query: [t, np, hn]; head h reads KV head h // g.
        keys: [t, ng, hn], the query's dtype.
        values: [t, ng, w_v], the query's dtype.
        lens: tokens of each sequence, none for some; their sum is t.
        softmax_scale: factor on q . k.

    Returns:
        `out` [t, np, w_v] in the query's dtype and `lse` [t, np], float32: the fields of
        `AttentionState`, with the tokens in place of sequences and their queries.

    Raises:
        ValueError: `lens` do not sum to t.

    Example:
        Two sequences of 2 and 1 tokens, lens 2, 1, all keys 0, values 1, 3, 5: out 1, 2, 5,
        lse 0, log 2, 0.
    """
    if sum(lens) != len(query):
        raise ValueError(f"lens sum to {sum(lens)}, but there are {len(query)} tokens")
    out = query.new_empty(*query.shape[:2], values.shape[2])
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    first = 0
    for length in lens:
        if length:
            own = slice(first, first + length)
            out[own], lse[own] = _attend(query[own], keys[own], values[own], softmax_scale)
        first += length
    return AttentionState(out, lse)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: out [s, np, w_v] and lse [s, np]."""
    # The kernels take channels to lie side by side, and the CPU's does not check it.
    query, keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    grouped = query.unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # [ng, g, s, hn]
    # Flash attention has one width; narrower values get zeros behind them.
    missing = keys.shape[2] - values.shape[2]
    padded = F.pad(values, (0, missing)) if missing > 0 else values
    operands = [grouped] + [
        x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (keys, padded)
    ]
    flash = _flash(*operands)
    if flash is None:
        return _attend_in_blocks(query, keys, values, softmax_scale)
    out, lse = flash(*operands, is_causal=True, scale=softmax_scale)[:2]
    out = out[..., : values.shape[2]].permute(2, 0, 1, 3).flatten(1, 2)
    return out, lse.permute(2, 0, 1).flatten(1, 2)


def _flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable | None:
    """The flash attention of torch that takes these operands; None: there is none."""
    if query.shape[3] != values.shape[3]:
        return None
    if query.is_cpu:
        is_known = query.dtype in CPU_DTYPES
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu if is_known else None
    params = SDPAParams(query, keys, values, None, 0.0, True, False)
    is_known = query.shape[3] % GPU_WIDTH_STEP == 0 and can_use_flash_attention(params)
    return torch.ops.aten._scaled_dot_product_flash_attention if is_known else None


def _attend_in_blocks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence in float32, in blocks of queries, each with the tokens up to its last."""
    keys, values = (x.float().transpose(0, 1).unsqueeze(1) for x in (keys, values))
    parts = []
    for first in range(0, len(query), QUERY_BLOCK):
        rows = query[first : first + QUERY_BLOCK].float()
        last = first + len(rows)
        causal = torch.ones(1, len(rows), last, dtype=torch.bool, device=query.device)
        parts.append(dense_attention(
            rows.unsqueeze(0), keys[:, :, :last], values[:, :, :last], causal.tril(first),
            softmax_scale,
        ))
    out, lse = (torch.cat(part, dim=1).squeeze(0) for part in zip(*parts))
    return out, lse
