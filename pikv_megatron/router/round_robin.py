"""Routing in turns (paper, Table 1, R_B)."""

from typing import Literal

from pydantic import Field

from pikv_megatron.router.base import RouterOptions
from pikv_megatron.router.hash import RunRouter


class RoundRobinOptions(RouterOptions):
    """Each token visits the next k shards, so that every shard is visited in its turn."""

    name: Literal["round_robin"] = "round_robin"
    k: int = Field(2, ge=1, description="shards to visit")

    def build(self, num_slots, num_shards, device):
        return RunRouter(self.k, num_shards, 1, self.k)
