"""Attention over pages as wholes: each has an estimated logit and the mean of its values.

The torch version serves where no kernel does.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, m pages listed for a sequence, p rows
of the mean values, w their width.
"""

import torch

from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.ops.dense_attention import empty_state
from pikv_megatron.types import AttentionState


@torch.no_grad()
def attend_means(
    logit: torch.Tensor, is_tail: torch.Tensor, mean_value: torch.Tensor, table: torch.Tensor
) -> AttentionState:
    """The tail of a selection: what attention over the pages that are not read would give.

    The tokens of a page share its mass equally, so its part of the output is its mean value. The
    state merges with that of the pages that are read.

    Args:
        logit: [n, np, m], float32, estimated log-sum-exp of a page's scaled logits; anything, NaN
            too, where `is_tail` is False.
        is_tail: [n, m], bool, the pages that count.
        mean_value: [ng, p, w], any floating dtype; head h reads KV head h // g.
        table: [n, m], int64, rows of `mean_value`; any, of whatever content, where `is_tail` is
            False.

    Returns:
        out [n, 1, np, w], float32, 0 where nothing is in the tail; lse [n, 1, np], -inf there.

    Example:
        Logits 0, log 3 and 7, the last not in the tail, mean values 1, 5 and 9: out
        (1 + 3 * 5) / 4 = 4, lse log 4.
    """
    kernel = kernel_op("attend_means", logit)
    if kernel is not None:
        return AttentionState(*kernel(logit, is_tail, mean_value, table))
    num_groups, width = mean_value.shape[0], mean_value.shape[2]
    if table.numel() == 0:
        return empty_state(logit.unsqueeze(1), width)
    weight, lse = _weights(logit, is_tail)
    weight = weight.unflatten(1, (num_groups, -1)).transpose(0, 1)  # [ng, n, g, m]
    # A weight of 0 does not help against NaN.
    values = mean_value[:, table].float().masked_fill(~is_tail.unsqueeze(2), 0.0)
    out = torch.matmul(weight, values).transpose(0, 1).flatten(1, 2)
    return AttentionState(out.unsqueeze(1), lse.unsqueeze(1))


def _weights(logit: torch.Tensor, is_tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the tail [n, np, m], 0 outside of it, and its log-sum-exps [n, np]."""
    logit = logit.masked_fill(~is_tail.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(logit, dim=2)
    anchor = lse.masked_fill(lse == -torch.inf, 0.0)
    return logit.sub_(anchor.unsqueeze(2)).exp_(), lse
