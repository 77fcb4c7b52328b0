"""Routing from coarse to fine (paper, Table 1, R_H: a two-stage top-k).

Legend: n sequences, N shards.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter
from pikv_megatron.router.gate import GateOptions


class HierarchicalOptions(GateOptions):
    """The best groups of shards, then the k best shards of them."""

    name: Literal["hierarchical"] = "hierarchical"
    groups: int = Field(
        2, ge=1, description="groups of shards, shard s in group s mod groups; a multiple of the "
        "expert-parallel size puts each on one rank"
    )
    visited_groups: int = Field(1, ge=1, description="groups to visit")

    def at_share(self, share, num_shards):
        """Of as few groups as have so many shards."""
        put = super().at_share(share, num_shards)
        visited = -(-put.k * min(self.groups, num_shards) // num_shards)
        return put.model_copy(update={"visited_groups": visited})

    def build(self, num_slots, num_shards, device):
        return HierarchicalRouter(self.k, self.groups, self.visited_groups)


class HierarchicalRouter(KVRouter):
    """A group is worth what its shards promise together. Its shards lie on few ranks, so a query
    travels to few."""

    def __init__(self, k: int, num_groups: int, visited_groups: int):
        self._k = k
        self._num_groups, self._visited = num_groups, visited_groups

    def visit(self, ask):
        scores = ask.shard_scores()
        num_groups = min(self._num_groups, scores.shape[1])
        group = torch.arange(scores.shape[1], device=scores.device) % num_groups
        coarse = scores.new_zeros(len(scores), num_groups).index_add_(1, group, scores)
        nothing = torch.zeros_like(scores[:1])
        is_open = route_topk(coarse, nothing[:, :num_groups], self._visited)[:, group]
        fine = scores.masked_fill(~is_open, -torch.inf)
        return route_topk(fine, nothing, self._k) & is_open
