"""Merges partial attention by natural log-sum-exp: exact, in any order."""

import torch

from pikv_megatron.types import AttentionState


def merge_states(out: torch.Tensor, lse: torch.Tensor) -> AttentionState:
    """Merge k parts: l = logsumexp_i(l_i), o = sum_i exp(l_i - l) o_i.

    Args:
        out: [k, n, sq, np, hn], outputs of the parts.
        lse: [k, n, sq, np], float32, their log-sum-exps; -inf marks a part without keys.

    Example:
        Two parts with o = 1 and o = 3 and equal l = 0 merge to o = 2, l = log 2.
    """
    total = torch.logsumexp(lse, dim=0)
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    merged = (out * weight.unsqueeze(-1).to(out.dtype)).sum(dim=0)
    return AttentionState(merged, total)
