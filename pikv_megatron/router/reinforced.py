"""Routing that learns from reward (paper, Table 1, R_A).

The reward of a query is the attention that the visited shards gave, less a cost for each of them.
It is largest where just the shards are visited that give more than they cost, so what there is to
learn is how much a shard gives.

Legend: n sequences, N shards.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter
from pikv_megatron.router.gate import GateOptions, new_counts
from pikv_megatron.router.visits import VisitSums, visit_features


class ReinforcedOptions(GateOptions):
    """Up to k shards, those that give more than a visit costs, as a calibration, earlier runs
    (`learned`) and earlier visits taught."""

    name: Literal["reinforced"] = "reinforced"
    cost: float = Field(0.01, ge=0, le=1, description="share of the attention that a visit costs")
    online: bool = Field(
        True, description="whether visits teach: the sequence, what its shards give, and "
        "`learned`, what any shard does"
    )

    keeps_learned: ClassVar[bool] = True

    @property
    def needs_newest(self) -> bool:
        return self.source == "relevance"

    def build(self, num_slots, num_shards, device):
        shape = num_slots, num_shards, device
        visits = VisitSums(f"visits.{self.source}", device)
        return ReinforcedRouter(self, visits, new_counts(*shape), new_counts(*shape))


class ReinforcedRouter(KVRouter):
    """A contextual bandit, greedy, in two parts.

    What any shard gives is expected of what home knows of it (`VisitSums`, of the layer): where
    nothing was learned, its share of the relevance. Online, a sequence learns by itself how far
    that is true of each of its shards: given / expected, both summed over visits, with one query's
    whole attention before the first. A share of the relevance is of the attention to pages, and
    windows take much of the whole, so it comes down with every visit; a shard that was not visited
    for long looks the better for it, and is tried again.
    """

    def __init__(
        self, options: ReinforcedOptions, visits: VisitSums, promised: torch.Tensor,
        given: torch.Tensor,
    ):
        self._k, self._cost, self.learns = options.k, options.cost, options.online
        self.visits = visits
        self._promised, self._given = promised, given

    def visit(self, ask):
        self._features = visit_features(ask.shard_scores(), ask.newest_shard())
        self._promise = self.visits.expect(self._features)
        worth = (self._given[ask.slots] + 1.0) / (self._promised[ask.slots] + 1.0)
        value = self._promise * worth
        nothing = torch.zeros_like(value[:1])
        best = route_topk(value, nothing, 1)
        return best | (route_topk(value, nothing, self._k) & (value > self._cost))

    def learn(self, slots, shards, mass):
        self._promised.index_add_(0, slots, self._promise * shards)
        self._given.index_add_(0, slots, mass * shards)
        self.visits.teach(self._features, shards, mass)

    def release(self, slot):
        self._promised[slot] = 0.0
        self._given[slot] = 0.0

    def tensors(self):
        return [self._promised, self._given]
