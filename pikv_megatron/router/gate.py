"""What the routers of the paper's Table 1 share: logits of the shards, less a penalty.

Legend: n sequences, N shards.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter, VisitingOptions
from pikv_megatron.router.linear_gate import LinearGate


class GateOptions(VisitingOptions):
    """Parameters of a router over shard logits."""

    source: Literal["relevance", "moe", "previous", "gate"] = Field(
        "relevance", description="logits of the shards: `relevance`, page scores summed per shard; "
        "`moe`, what the layer's MoE router makes of the attention's input; `previous`, experts "
        "that the MoE layer before chose; `gate`, what a calibrated linear gate makes of the "
        "attention's input; these three where shards belong to experts"
    )

    @property
    def needs_sketch(self) -> bool:
        return self.source == "relevance"

    @property
    def expert_source(self) -> str | None:
        return None if self.source == "relevance" else self.source

    def gate(self, fitted):
        return LinearGate(fitted) if self.source == "gate" else None


class GateRouter(KVRouter):
    """Visits the k shards of the largest logits less their penalties, in nats.

    Args:
        k: shards to visit.
        counts: [slots, N], float32, zeros: what a router counts of each sequence and shard.
    """

    def __init__(self, k: int, counts: torch.Tensor):
        self._k = k
        self._counts = counts

    def visit(self, ask):
        logits = ask.shard_scores().log()
        shards = route_topk(logits, self.penalty(self._counts[ask.slots]), self._k)
        self.count(ask, shards)
        return shards

    def penalty(self, counts: torch.Tensor) -> torch.Tensor:
        """[n, N], subtracted from the logits, for counts [n, N]."""
        return torch.zeros_like(counts)

    def count(self, ask, shards: torch.Tensor) -> None:
        """Take note of the shards [n, N] that are visited."""

    def release(self, slot):
        self._counts[slot] = 0.0

    def tensors(self):
        return [self._counts]


def new_counts(num_slots: int, num_shards: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_slots, num_shards, device=device)
