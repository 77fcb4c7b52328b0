"""Merges partial attention by natural log-sum-exp: exact, in any order."""

import torch

from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.types import AttentionState


def merge_states(out: torch.Tensor, lse: torch.Tensor) -> AttentionState:
    """Merge k parts: l = logsumexp_i(l_i), o = sum_i exp(l_i - l) o_i.

    Args:
        out: [k, n, sq, np, w], outputs of the parts; anything, NaN too, where `lse` is -inf.
        lse: [k, n, sq, np], float32, their log-sum-exps; -inf marks a part without keys.

    Returns:
        out in the type of the parts, summed in float32; 0 where no part has keys.

    Example:
        Two parts with o = 1 and o = 3 and equal l = 0 merge to o = 2, l = log 2.
    """
    kernel = kernel_op("merge_states", out)
    if kernel is not None:
        return AttentionState(*kernel(out, lse))
    total = torch.logsumexp(lse, dim=0)
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0)).unsqueeze(-1)
    parts = out.float().masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return AttentionState((parts * weight).sum(dim=0).to(out.dtype), total)
