"""Moments of keys and values by the expert that the layer's router chose for a token.

Legend: t tokens, ng KV heads, w width, n groups of experts.
"""

import torch
from torch import Tensor

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.codec.calibration import EXPERTS
from pikv_megatron.config import MAX_EXPERT_SHARDS


class ExpertMomentsFit(LayerFit):
    """Sums in float64, where experts are to be told apart.

    Expert e is in group e mod 32: every number of expert shards divides 32, so no cache can tell
    experts of a group apart.
    """

    def of(self, window):
        if not window.per_expert:
            return {}
        experts = window.experts
        if experts is None:
            experts = window.key.new_ones(len(window.key), 1)
        count = min(experts.shape[1], MAX_EXPERT_SHARDS)
        group = experts.argmax(dim=1) % MAX_EXPERT_SHARDS
        sums = {"count": torch.bincount(group, minlength=count).double()}
        chosen = [group == number for number in range(count)]
        for side, x in (("key", window.key), ("value", window.value)):
            own = [x[is_own].transpose(0, 1).double() for is_own in chosen]
            sums[side] = torch.stack([x.sum(dim=1) for x in own])
            sums[f"{side}s"] = torch.stack([torch.bmm(x.transpose(1, 2), x) for x in own])
        return sums

    def finish(self, sums):
        count = sums["count"]
        return {
            f"{EXPERTS}{side}s.{name}": part for side in ("key", "value")
            for name, part in _moments(count, sums[side], sums[f"{side}s"]).items()
        }


def _moments(count: Tensor, total: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Of count [n], total [n, ng, w] and second [n, ng, w, w]; zeros where there are no tokens."""
    mean = total / count.clamp(min=1).view(-1, 1, 1)
    outer = mean.unsqueeze(3) * mean.unsqueeze(2)
    scatter = second - count.view(-1, 1, 1, 1) * outer
    return {"mean": mean.float(), "scatter": scatter.float(), "count": count.long()}
