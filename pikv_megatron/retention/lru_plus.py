"""Pages that were used last, or often, stay (paper, Table 3, S_LRU+: u = -r + lambda f)."""

from typing import Literal

from pydantic import Field

from pikv_megatron.retention.base import RetentionPolicy
from pikv_megatron.retention.lru import LRUOptions, last_used


class LRUPlusOptions(LRUOptions):
    """As `lru`, and every use counts as if the last one had been some tokens later."""

    name: Literal["lru_plus"] = "lru_plus"
    frequency: float = Field(8.0, ge=0, description="tokens of recency that a use is worth")

    def build(self, fitted=None):
        return LRUPlusPolicy(self.frequency)


class LRUPlusPolicy(RetentionPolicy):
    """Recency and frequency in one unit, positions."""

    def __init__(self, frequency: float):
        self._frequency = frequency

    def utility(self, stats):
        return last_used(stats).float() + self._frequency * stats.uses
