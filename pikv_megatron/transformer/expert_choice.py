"""Which experts a token goes through, as two short lists instead of Megatron's rows of all experts.

Legend: t tokens, k experts of a token, E experts on all ranks, h hidden size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

# Ways to balance the load that say nothing of which experts are chosen; releases differ in others.
PLAIN_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


class ExpertChoice(NamedTuple):
    """
    Attributes:
        experts: [t, k], int64, each once.
        weights: [t, k], of their outputs; 0 where a token was turned away.
    """

    experts: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, probs: torch.Tensor, k: int) -> "ExpertChoice":
        """What Megatron's router says in weights [t, E] that are 0 for experts not chosen."""
        weights, experts = probs.topk(k, dim=1)
        return cls(experts, weights)

    def best(self, count: int) -> torch.Tensor:
        """[t, count]: the experts with the largest weights, best first."""
        return self.experts.gather(1, self.weights.topk(count, dim=1).indices)


def choose_experts(router: TopKRouter, hidden_states: torch.Tensor) -> ExpertChoice:
    """What the router chooses for hidden states [sq, b, h], t = sq * b.

    The common ways to choose take four calls here; Megatron, which goes on to write the weights and
    a mask of all experts for its dispatcher, makes fifteen.
    """
    if not _is_plain(router):
        return ExpertChoice.of(router(hidden_states)[0], router.topk)
    logits = router_logits(router, hidden_states.flatten(0, 1))
    if router.score_function == "sigmoid":
        choice = _by_sigmoid(router, logits)
    elif router.config.moe_router_pre_softmax:
        weights, experts = _softmax(logits).topk(router.topk, dim=1)
        choice = ExpertChoice(experts, weights)
    else:
        best, experts = logits.topk(router.topk, dim=1)
        choice = ExpertChoice(experts, _softmax(best))
    factor = router.config.moe_router_topk_scaling_factor
    return choice._replace(weights=choice.weights * factor) if factor else choice


def _is_plain(router: TopKRouter) -> bool:
    """Whether it does no more than choose by score, and nobody listens to it."""
    config = router.config
    balancing = router.routing_type
    kinds = [balancing] if isinstance(balancing, str) else balancing
    return (
        all(kind in PLAIN_BALANCING for kind in kinds)
        and router.score_function in ("softmax", "sigmoid")
        and router.router_replay is None
        and config.moe_expert_capacity_factor is None
        and not config.moe_router_group_topk
        and not config.moe_router_force_load_balancing
        and config.moe_input_jitter_eps is None
        and not router._forward_hooks
        and not router._forward_pre_hooks
    )


def router_logits(router: TopKRouter, tokens: torch.Tensor) -> torch.Tensor:
    """[t, E], in the type that the configuration names."""
    wanted = {"fp32": torch.float32, "fp64": torch.float64}
    dtype = wanted.get(router.config.moe_router_dtype, tokens.dtype)
    bias = None if router.bias is None else router.bias.to(dtype)
    return F.linear(tokens.to(dtype), router.weight.to(dtype), bias)


def _by_sigmoid(router: TopKRouter, logits: torch.Tensor) -> ExpertChoice:
    scores = _narrowed(logits.float().sigmoid(), logits)
    if router.expert_bias is None:
        weights, experts = scores.topk(router.topk, dim=1)
    else:
        router._maintain_float32_expert_bias()
        experts = (scores + router.expert_bias).topk(router.topk, dim=1).indices
        weights = scores.gather(1, experts)
    if router.topk > 1:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return ExpertChoice(experts, weights)


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return _narrowed(torch.softmax(logits, dim=1, dtype=torch.float32), logits)


def _narrowed(scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """In the type of the logits: Megatron rounds there, and near ties would fall differently."""
    return scores.to(logits.dtype)
