"""Cache-aware routing, the PiKV router (paper, Table 1, R_P: penalty lambda log(1 + miss_e))."""

from typing import Literal

from pydantic import Field

from pikv_megatron.router.gate import GateOptions, GateRouter, new_counts


class CacheAwareOptions(GateOptions):
    """As `top_k`, less what a shard's misses say: visits that gave hardly any attention."""

    name: Literal["cache_aware"] = "cache_aware"
    penalty: float = Field(0.5, ge=0, description="nats times the log of 1 + misses")
    tau: float = Field(0.01, ge=0, le=1, description="share of the attention; less is a miss")

    def build(self, num_slots, num_shards, device):
        counts = new_counts(num_slots, num_shards, device)
        return CacheAwareRouter(self.k, counts, self.penalty, self.tau)


class CacheAwareRouter(GateRouter):
    """Misses are measured: what a visited shard really gave, of the query's whole attention."""

    learns = True

    def __init__(self, k, counts, weight: float, tau: float):
        super().__init__(k, counts)
        self._weight, self._tau = weight, tau

    def penalty(self, counts):
        return self._weight * counts.log1p()

    def learn(self, slots, shards, mass):
        self._counts.index_add_(0, slots, (shards & (mass < self._tau)).float())
