"""A router whose groups of experts are judged as the model was trained, for inference.

Megatron-Core judges a group by moe_router_topk // moe_router_group_topk of its experts. DeepSeek-V2
takes the best one, its successors the two best.

Legend: t tokens, E experts, k of them chosen.
"""

import torch
from megatron.core.transformer.moe.router import TopKRouter


def group_router(num_judges: int) -> type:
    """A `TopKRouter` that judges a group by so many of its experts, the best ones."""

    class GroupRouter(TopKRouter):
        def routing(self, logits, *unused, **also_unused):
            return _routed(self, logits.view(-1, self.config.num_moe_experts), num_judges)

    return GroupRouter


def _routed(
    router: TopKRouter, logits: torch.Tensor, num_judges: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the choice [t, E] of logits [t, E]: sigmoid scores, or a softmax of all."""
    if router.score_function == "sigmoid":
        scores = logits.float().sigmoid()
        judged = scores if router.expert_bias is None else scores + router.expert_bias
    else:
        scores = judged = logits.float().softmax(dim=1)
    experts = _in_best_groups(router, judged, num_judges).topk(router.topk, dim=1).indices
    weights = scores.gather(1, experts)
    if router.score_function == "sigmoid" and router.topk > 1:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    weights = weights * (router.config.moe_router_topk_scaling_factor or 1.0)
    probs = torch.zeros_like(logits).scatter(1, experts, weights.to(logits.dtype))
    return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)


def _in_best_groups(router: TopKRouter, judged: torch.Tensor, num_judges: int) -> torch.Tensor:
    """Scores [t, E], -inf outside of the groups that a token chooses."""
    by_group = judged.unflatten(1, (router.config.moe_router_num_groups, -1))
    mark = by_group.topk(num_judges, dim=2).values.sum(dim=2)
    best = mark.topk(router.config.moe_router_group_topk, dim=1).indices
    is_out = torch.ones_like(mark, dtype=torch.bool).scatter(1, best, False)
    return by_group.masked_fill(is_out.unsqueeze(2), -torch.inf).flatten(1)
