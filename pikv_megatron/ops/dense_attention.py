"""Attention of a few queries over dense keys and values, in plain torch.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, hn head width,
t tokens.
"""

import torch

from pikv_megatron.types import AttentionState


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    softmax_scale: float,
) -> AttentionState:
    """Attend to dense keys; heads of a group share one matrix product.

    Args:
        query: [n, sq, np, hn].
        keys: [ng, n, t, hn].
        values: [ng, n, t, hn].
        mask: [n, t] or [n, sq, t], bool, True where the token is to be read.
        softmax_scale: factor on the logits.
    """
    if query.shape[0] == 0:
        return empty_state(query, values.shape[3])
    num_groups = keys.shape[0]
    group = query.shape[2] // num_groups
    rows = group_heads(query, num_groups) * softmax_scale
    logits = torch.matmul(rows, keys.transpose(2, 3)).float()
    hidden = ~(mask.unsqueeze(1) if mask.dim() == 2 else mask.repeat_interleave(group, dim=1))
    logits.masked_fill_(hidden, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = logits.sub_(finite.unsqueeze(-1)).exp_().to(values.dtype)
    out = torch.matmul(weights, values)
    return AttentionState(
        ungroup_heads(out, query.shape[1]), ungroup_heads(lse.unsqueeze(-1), query.shape[1])[..., 0]
    )


def group_heads(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[n, sq, np, w] -> [ng, n, sq * g, w]: the rows that share a KV head."""
    return x.unflatten(2, (num_groups, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)


def ungroup_heads(rows: torch.Tensor, num_queries: int) -> torch.Tensor:
    """[ng, n, sq * g, w] -> [n, sq, np, w]: the inverse of `group_heads`."""
    return rows.unflatten(2, (num_queries, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def empty_state(query: torch.Tensor, width: int) -> AttentionState:
    """The attention of query [n, sq, np, r_k] over nothing: out [n, sq, np, width]."""
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    return AttentionState(query.new_zeros(*query.shape[:-1], width), lse)
