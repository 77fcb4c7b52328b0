"""The transformer layer under PiKV: tells the cache which experts the MoE router chose.

Legend: sq tokens of a row, b rows of the batch, t tokens of them that are real.

It also makes the experts lean, which a spec cannot: Megatron-Core 0.16 gives its process groups to
`MoELayer` alone, and to no class derived from it.
"""

import torch

from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.expert_choice import ExpertChoice
from pikv_megatron.transformer.expert_shares import ExpertShares, shares_of
from pikv_megatron.transformer.lean_layer import LeanLayerMixin
from pikv_megatron.transformer.lean_moe import LeanMoELayer, make_lean


class PiKVLayerMixin(LeanLayerMixin):
    """Settles the layer's cache after the MLP, when the experts of the step's tokens are known."""

    lean_context = PiKVInferenceContext

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.self_attention.pikv_config.lean_experts and self.is_plain:
            make_lean(self.mlp)
        self._router_probs = None
        self.self_attention.expert_shares = ExpertShares(self.mlp)
        router = getattr(self.mlp, "router", None)
        if router is not None and not isinstance(self.mlp, LeanMoELayer):
            router.register_forward_hook(self._keep_router_probs)

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        context = kwargs.get("inference_context")
        if isinstance(context, PiKVInferenceContext) and not self.training:
            experts, choice = None, self.expert_choice() if context.keeps_experts else None
            if choice is not None:
                experts = self._best_experts(choice, context, *hidden_states.shape[:2])
            if choice is not None and context.keeps_last_experts:
                context.last_experts = shares_of(choice, self.config.num_moe_experts)
            context.layers[self.layer_number].settle(context.plan, experts)
        self._router_probs = None
        return output

    def expert_choice(self) -> ExpertChoice | None:
        """Of the step's tokens, with its padding; None in a layer without experts."""
        if isinstance(self.mlp, LeanMoELayer):
            return self.mlp.choice
        if self._router_probs is not None:
            return ExpertChoice.of(self._router_probs, self.mlp.router.topk)
        return None

    def _best_experts(
        self, choice: ExpertChoice, context: PiKVInferenceContext, sq: int, b: int
    ) -> torch.Tensor:
        """[t, replicas], int16, of the step's tokens."""
        # The router sees [sq, b, h] flattened; tokens behind the real ones are padding.
        best = choice.best(context.keeps_experts).view(sq, b, -1).transpose(0, 1).flatten(0, 1)
        return best[: context.plan.num_tokens].to(torch.int16)

    def _keep_router_probs(self, router, args, output) -> None:
        self._router_probs = output[0]


def pikv_layer_class(base: type) -> type:
    """`base` with `PiKVLayerMixin`; parameters and state-dict keys stay the same."""
    return type(f"PiKV{base.__name__}", (PiKVLayerMixin, base), {"__module__": __name__})
