"""A learned logit beside those of the keys: attention to nothing, which lets a head stay silent."""

import torch

from pikv_megatron.types import AttentionState


def with_sink(state: AttentionState, sink: torch.Tensor | None) -> torch.Tensor:
    """The output of a whole softmax that has one logit more, whose value is zero.

    It is applied once, after all parts were merged: out * exp(lse) / (exp(lse) + exp(sink)), and
    that factor is sigmoid(lse - sink).

    Args:
        state: `out` [..., np, w] and `lse` [..., np], over all keys.
        sink: [np], the logit of each head; None: there is none.

    Returns:
        [..., np, w], in the state's dtype.

    Example:
        One key of logit 0 and value 2, sink 0: half of the attention goes to nothing, out 1.
    """
    if sink is None:
        return state.out
    share = torch.sigmoid(state.lse - sink.float()).unsqueeze(-1)
    return (state.out * share).to(state.out.dtype)
