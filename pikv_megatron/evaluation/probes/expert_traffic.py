"""Which experts' tokens went to which shards: of prompts, all layers with experts together.

Legend: E experts, N shards, t tokens of this home rank's step.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from pikv_megatron.transformer.context import PiKVInferenceContext


class ExpertTraffic:
    """Listens to the routers of a model.

    Args:
        model: with MoE layers.
        context: places the tokens.

    Attributes:
        is_on: count what is fed.
        tokens: [E, N], int64.
    """

    def __init__(self, model: GPTModel, context: PiKVInferenceContext):
        self._context = context
        self._num_experts = model.config.num_moe_experts
        self._device = next(model.parameters()).device
        self.is_on = False
        self.reset()
        self._handles = [
            layer.mlp.router.register_forward_hook(self._count)
            for layer in model.decoder.layers if isinstance(layer.mlp, MoELayer)
        ]

    def reset(self) -> None:
        """Count from zero."""
        self.tokens = torch.zeros(
            self._num_experts, self._context.placement.num_shards, dtype=torch.int64,
            device=self._device,
        )

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _count(self, router, args, routed: tuple[Tensor, Tensor]) -> None:
        """`routed` are the probabilities and the choice [t, E], padding behind the tokens."""
        if not self.is_on:
            return
        plan, placement = self._context.plan, self._context.placement
        token, expert = routed[1][: plan.num_tokens].nonzero().unbind(1)
        position = plan.positions[: plan.num_tokens][token]
        shard = placement.shard(position, expert if placement.expert_shards > 1 else None)
        pair = expert * placement.num_shards + shard
        self.tokens += pair.bincount(minlength=self.tokens.numel()).view_as(self.tokens)
