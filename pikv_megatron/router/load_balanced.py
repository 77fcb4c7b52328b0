"""Load-balanced routing (paper, Table 1, R_LB: penalty alpha (mu_e - mean mu))."""

from typing import Literal

from pydantic import Field

from pikv_megatron.router.gate import GateOptions, GateRouter, new_counts


class LoadBalancedOptions(GateOptions):
    """As `top_k`, less what a shard had to read for the sequence so far."""

    name: Literal["load_balanced"] = "load_balanced"
    alpha: float = Field(0.5, ge=0, description="nats a unit of load, the mean over shards")

    @property
    def needs_sketch(self) -> bool:
        return True  # pages are counted, whoever says what they are worth

    def build(self, num_slots, num_shards, device):
        return LoadBalancedRouter(self.k, new_counts(num_slots, num_shards, device), self.alpha)


class LoadBalancedRouter(GateRouter):
    """A visit is as much load as the shard has pages: queries served times tokens stored.

    Load is in units of its mean, so alpha means the same after ten tokens and after ten thousand;
    every sequence balances its own visits, and so their sum is balanced.
    """

    def __init__(self, k, counts, alpha: float):
        super().__init__(k, counts)
        self._alpha = alpha

    def penalty(self, counts):
        # One mean visit everywhere to begin with: the first visits decide nothing.
        load = counts + 1.0
        return self._alpha * (load / load.mean(dim=1, keepdim=True) - 1.0)

    def count(self, ask, shards):
        pages = ask.shard_pages()
        mean = pages.mean(dim=1, keepdim=True).clamp(min=1e-6)
        self._counts.index_add_(0, ask.slots, shards * pages / mean)
