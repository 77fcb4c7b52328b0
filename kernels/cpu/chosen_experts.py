"""SwiGLU experts of a few tokens: `chosen_experts.cpp`."""

import torch

from pikv_kernels.cpu.compiled import call
from pikv_kernels.cpu.fields import TYPES


def chosen_experts(
    tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, weight1: torch.Tensor,
    weight2: torch.Tensor,
) -> torch.Tensor:
    """The sum of each token's experts, weighted, [t, h], in the type of the tokens.

    Args:
        tokens: [t, h], of the type of the weights.
        experts: [t, k], int64; numbers outside of [0, E) add nothing.
        weights: [t, k].
        weight1: [E, 2f, h], contiguous, the gates first.
        weight2: [E, h, f], contiguous.
    """
    tokens, experts = tokens.contiguous(), experts.contiguous()
    weights = weights.float().contiguous()
    out = torch.empty(tokens.shape)
    call("chosen_experts", [
        *experts.shape, *weight2.shape, TYPES[tokens.dtype], experts.data_ptr(),
        weights.data_ptr(), tokens.data_ptr(), weight1.data_ptr(), weight2.data_ptr(),
        out.data_ptr(),
    ])
    return out.to(tokens.dtype)
