"""Routing that learns from reward (paper, Table 1, R_A).

The reward of a query is the attention that the visited shards gave, less a cost for each of them.
It is largest where just the shards are visited that give more than they cost, so what there is to
learn is how much a shard gives of what it promises.

Legend: n sequences, N shards.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter
from pikv_megatron.router.gate import GateOptions, new_counts


class ReinforcedOptions(GateOptions):
    """Up to k shards, those that give more than a visit costs, as earlier visits taught."""

    name: Literal["reinforced"] = "reinforced"
    cost: float = Field(0.01, ge=0, le=1, description="share of the attention that a visit costs")

    def build(self, num_slots, num_shards, device):
        shape = num_slots, num_shards, device
        return ReinforcedRouter(self.k, self.cost, new_counts(*shape), new_counts(*shape))


class ReinforcedRouter(KVRouter):
    """A contextual bandit, greedy, online, for each sequence by itself.

    A shard is worth its promise, its share of the relevance, times what such promises were worth
    when it was visited: given / promised, both summed over visits, with one query's whole attention
    before the first. Promises are of the attention to pages, and windows take much of the whole, so
    they come down with every visit; a shard that was not visited for long looks the better for it,
    and is tried again.
    """

    learns = True

    def __init__(self, k: int, cost: float, promised: torch.Tensor, given: torch.Tensor):
        self._k, self._cost = k, cost
        self._promised, self._given = promised, given

    def visit(self, ask):
        self._promise = ask.shard_scores()
        worth = (self._given[ask.slots] + 1.0) / (self._promised[ask.slots] + 1.0)
        value = self._promise * worth
        nothing = torch.zeros_like(value[:1])
        best = route_topk(value, nothing, 1)
        return best | (route_topk(value, nothing, self._k) & (value > self._cost))

    def learn(self, slots, shards, mass):
        self._promised.index_add_(0, slots, self._promise * shards)
        self._given.index_add_(0, slots, mass * shards)

    def release(self, slot):
        self._promised[slot] = 0.0
        self._given[slot] = 0.0

    def tensors(self):
        return [self._promised, self._given]
