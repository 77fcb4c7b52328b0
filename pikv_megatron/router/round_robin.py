"""Routing in turns (paper, Table 1, R_B)."""

from typing import Literal

from pikv_megatron.router.base import VisitingOptions
from pikv_megatron.router.hash import RunRouter


class RoundRobinOptions(VisitingOptions):
    """Each token visits the next k shards, so that every shard is visited in its turn."""

    name: Literal["round_robin"] = "round_robin"

    def build(self, num_slots, num_shards, device):
        return RunRouter(self.k, num_shards, 1, self.k)
