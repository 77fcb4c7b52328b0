"""The transformer layer under PiKV: tells the cache which experts the MoE router chose.

It also makes the experts lean, which a spec cannot: Megatron-Core 0.16 gives its process groups to
`MoELayer` alone, and to no class derived from it.
"""

from contextlib import nullcontext

import torch

from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.lean_moe import LeanMoELayer, make_lean


class PiKVLayerMixin:
    """Settles the layer's cache after the MLP, when the experts of the step's tokens are known."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.self_attention.pikv_config.lean_experts:
            make_lean(self.mlp)
        self._router_probs = None
        router = getattr(self.mlp, "router", None)
        if router is not None:
            router.register_forward_hook(self._keep_router_probs)

    def forward(self, hidden_states, *args, **kwargs):
        context = kwargs.get("inference_context")
        is_cached = isinstance(context, PiKVInferenceContext) and not self.training
        is_lean = is_cached and isinstance(self.mlp, LeanMoELayer)
        with self.mlp.lean_step(context) if is_lean else nullcontext():
            output = super().forward(hidden_states, *args, **kwargs)
        if is_cached:
            self._settle(context, hidden_states)
        self._router_probs = None
        return output

    def _settle(self, context: PiKVInferenceContext, hidden_states: torch.Tensor) -> None:
        plan = context.plan
        experts = None
        if context.keeps_experts and self._router_probs is not None:
            # The router sees [sq, b, h] flattened; tokens behind the real ones are padding.
            best = self._router_probs.topk(context.keeps_experts, dim=-1).indices
            best = best.view(*hidden_states.shape[:2], -1).transpose(0, 1).flatten(0, 1)
            experts = best[: plan.num_tokens].to(torch.int16)
        context.layers[self.layer_number].settle(plan, experts)

    def _keep_router_probs(self, router, args, output) -> None:
        self._router_probs = output[0]


def pikv_layer_class(base: type) -> type:
    """`base` with `PiKVLayerMixin`; parameters and state-dict keys stay the same."""
    return type(f"PiKV{base.__name__}", (PiKVLayerMixin, base), {"__module__": __name__})
