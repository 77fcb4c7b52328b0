"""Entropy-penalised load balance (paper, Table 1, R_E: penalty beta H(p_e))."""

from typing import Literal

from pydantic import Field

from pikv_megatron.router.gate import GateOptions, GateRouter, new_counts


class EPLBOptions(GateOptions):
    """As `top_k`, less what a shard adds to the entropy of the sequence's visits."""

    name: Literal["eplb"] = "eplb"
    beta: float = Field(4.0, ge=0, description="nats a nat of entropy")

    def build(self, num_slots, num_shards, device):
        return EPLBRouter(self.k, new_counts(num_slots, num_shards, device), self.beta)


class EPLBRouter(GateRouter):
    """p_e is the share of the visits that shard e had, H(p_e) = -p_e log p_e.

    H rises up to a share of 1 / e, 0.37. So shards that are visited often give way to others where
    k is 3 or more; with fewer, a shard that every query visits (a share of 1 / k) pays little, and
    at k = 1 nothing: it is left alone.
    """

    def __init__(self, k, counts, beta: float):
        super().__init__(k, counts)
        self._beta = beta

    def penalty(self, counts):
        share = (counts + 1.0) / (counts + 1.0).sum(dim=1, keepdim=True)
        return self._beta * -share * share.log()

    def count(self, ask, shards):
        self._counts.index_add_(0, ask.slots, shards.float())
