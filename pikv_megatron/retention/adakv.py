"""Adaptive retention (paper, Table 3, S_AdaKV: u = sum_j alpha_j phi_j, with a moving threshold).

Legend: r sequences, m columns.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.retention.base import RetentionPolicy, best_first, place, running
from pikv_megatron.retention.lru import LRUOptions, last_used


class AdaKVOptions(LRUOptions):
    """Pages of the best features stay, no more than hold a share of their shard's attention."""

    name: Literal["adakv"] = "adakv"
    target: float = Field(
        0.95, gt=0, le=1, description="share of the attention to a shard's pages that stays"
    )
    mass: float = Field(1.0, ge=0, description="weight of the attention of a query, all heads")
    recency: float = Field(0.01, ge=0, description="weight of 1 / place by last use")
    frequency: float = Field(0.1, ge=0, description="weight of the share of queries that use it")

    def build(self, fitted=None):
        return AdaKVPolicy(self)


class AdaKVPolicy(RetentionPolicy):
    """Sharp attention keeps few pages and diffuse attention as many as the budget allows.

    The paper moves a threshold on the utility, theta + gamma (eta* - eta), until the hit rate eta
    is at its target. What every page had of the attention is counted, so the threshold at which
    the iteration rests is known at once: it is that of the last page that the target needs. Ada-KV
    (arXiv 2407.11550) moves budgets between heads; heads share their pages here, and shards keep
    what they need.
    """

    def __init__(self, options: AdaKVOptions):
        self._options = options

    def utility(self, stats):
        seen = stats.seen.clamp(min=1)
        utility = (
            self._options.mass * _mass(stats)
            + self._options.frequency * stats.uses / seen
            + self._options.recency / place(stats, last_used(stats).float())
        )
        return utility.masked_fill(stats.seen == 0, torch.inf)

    def drop(self, stats, limit):
        order = best_first(stats, self.utility(stats))
        shard = stats.own_shard
        hits = _mass(stats).masked_fill(~stats.is_page, 0.0)
        total = hits.new_zeros(limit.shape).scatter_add_(1, shard, hits).gather(1, shard)
        ranked = hits.gather(1, order)
        before = running(ranked, shard.gather(1, order)) - ranked
        before = torch.empty_like(before).scatter_(1, order, before)
        # All of the attention is all pages, however the sums are rounded.
        wanted = total * self._options.target if self._options.target < 1 else torch.inf
        is_spare = stats.is_page & (stats.seen > 0) & (total > 0) & (before >= wanted)
        return super().drop(stats, limit) | is_spare


def _mass(stats) -> torch.Tensor:
    """[r, m]: attention a query, summed over heads."""
    return stats.mass.sum(dim=2) / stats.seen.clamp(min=1)
