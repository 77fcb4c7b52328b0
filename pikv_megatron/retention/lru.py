"""Pages that were used last stay (paper, Table 3, S_LRU: u = -r)."""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.retention.base import ObservingOptions, RetentionPolicy
from pikv_megatron.types import PageStats


class LRUOptions(ObservingOptions):
    """Pages that a query used last stay: the one that was unused for longest goes."""

    name: Literal["lru"] = "lru"
    threshold: float = Field(
        0.01, gt=0, le=1, description="share of a query's attention from which a page is used"
    )

    @property
    def use_threshold(self):
        return self.threshold

    def build(self, fitted=None):
        return LRUPolicy()


class LRUPolicy(RetentionPolicy):
    """Time is counted in positions, and a page's own tokens use it when they come."""

    def utility(self, stats):
        return last_used(stats).float()


def last_used(stats: PageStats) -> torch.Tensor:
    """[r, m], int64: when each page was last used, or filled."""
    return torch.maximum(stats.newest, stats.last_used)
