"""Which experts' tokens went to which shards: of prompts, all layers with experts together.

Legend: E experts, N shards, t tokens of this home rank's step.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pikv_megatron.transformer.context import PiKVInferenceContext


class ExpertTraffic:
    """Listens to the routers of a model from `open` to `close`: it would slow decoding down.

    Args:
        model: with MoE layers.
        context: places the tokens.

    Attributes:
        tokens: [E, N], int64.
    """

    def __init__(self, model: GPTModel, context: PiKVInferenceContext):
        self._context = context
        self._routers = [
            layer.mlp.router for layer in model.decoder.layers if isinstance(layer.mlp, MoELayer)
        ]
        self._handles: list[RemovableHandle] = []
        self.tokens = torch.zeros(
            model.config.num_moe_experts, context.placement.num_shards, dtype=torch.int64,
            device=next(model.parameters()).device,
        )

    def open(self) -> None:
        """Count what is fed from now on."""
        self._handles = [r.register_forward_hook(self._count) for r in self._routers]

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, router, args, routed: tuple[Tensor, Tensor]) -> None:
        """`routed` are the probabilities and the choice [t, E], padding behind the tokens."""
        plan, placement = self._context.plan, self._context.placement
        token, expert = routed[1][: plan.num_tokens].nonzero().unbind(1)
        position = plan.tokens.positions[: plan.num_tokens][token]
        shard = placement.shard(position, expert if placement.expert_shards > 1 else None)
        pair = expert * placement.num_shards + shard
        self.tokens += pair.bincount(minlength=self.tokens.numel()).view_as(self.tokens)
