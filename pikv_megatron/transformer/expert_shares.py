"""What a layer's experts have to say to its cache before it attends.

Legend: sq tokens of a row, b rows of the batch, E experts on all ranks, h hidden size.
"""

import torch
from torch import nn

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.expert_choice import ExpertChoice, router_logits


class ExpertShares:
    """How much of a token each expert gets, or would get.

    Args:
        mlp: of the layer; with a router, where it is asked.
    """

    def __init__(self, mlp: nn.Module):
        self._mlp = mlp

    def __call__(
        self, hidden_states: torch.Tensor, context: PiKVInferenceContext, layer: LayerCache
    ) -> torch.Tensor:
        """[sq * b, E], float32, of 1: what the MoE layer before chose in this step, or what the
        cache's gate, or else (in the first layer, too) this layer's router, makes of hidden states
        [sq, b, h]."""
        if layer.expert_source == "previous" and context.last_experts is not None:
            return context.last_experts
        if layer.gate is not None:
            return layer.gate(hidden_states.flatten(0, 1))
        logits = router_logits(self._mlp.router, hidden_states.flatten(0, 1))
        return logits.float().softmax(dim=1)


def shares_of(choice: ExpertChoice, num_experts: int) -> torch.Tensor:
    """[t, E], float32, of 1: the weights of the chosen experts."""
    weights = choice.weights.float()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-20)
    shares = weights.new_zeros(len(weights), num_experts)
    return shares.scatter_(1, choice.experts, weights)
