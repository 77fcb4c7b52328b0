"""Attention of a piece of one sequence over itself and what came just before it, in a window.

Legend: s tokens of the piece, p tokens before it, np query heads, ng KV heads, hn head width, w_v
width of values.
"""

import torch

from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.types import AttentionState

QUERY_BLOCK = 256  # queries go in blocks, so that the logits stay small


@torch.no_grad()
def window_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int,
    softmax_scale: float,
) -> AttentionState:
    """Every token attends to itself and to the window - 1 tokens before it.

    Args:
        query: [s, np, hn]; head h reads KV head h // g.
        keys: [p + s, ng, hn], the query's dtype; tokens further back are not needed.
        values: [p + s, ng, w_v], the query's dtype.
        window: tokens that are seen, the own one included.
        softmax_scale: factor on q . k.

    Returns:
        `out` [s, np, w_v] in the query's dtype and `lse` [s, np], float32.

    Example:
        A window of 2, no past, all keys 0, values 1, 3, 5: out 1, 2, 4, lse 0, log 2, log 2.
    """
    past = len(keys) - len(query)
    keys, values = (x.transpose(0, 1).unsqueeze(1) for x in (keys, values))
    parts = []
    for start in range(0, len(query), QUERY_BLOCK):
        rows = query[start : start + QUERY_BLOCK]
        first, last = max(0, past + start - window + 1), past + start + len(rows)
        own = past + start - first  # the first row's own token, counted from `first`
        seen = torch.ones(1, len(rows), last - first, dtype=torch.bool, device=query.device)
        seen = seen.tril(own).triu(own - window + 1)
        near = (x[:, :, first:last].float() for x in (keys, values))
        parts.append(dense_attention(rows.float().unsqueeze(0), *near, seen, softmax_scale))
    out, lse = (torch.cat(part, dim=1).squeeze(0) for part in zip(*parts))
    return AttentionState(out.to(query.dtype), lse)
