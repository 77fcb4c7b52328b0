"""Each KV head keeps tokens of its own: several older pages become one.

Legend: ng KV heads, g query heads a KV head, c groups of pages, S tokens a page, w width.
"""

from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field

from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy
from pikv_megatron.retention.expected_queries import ExpectedQueries
from pikv_megatron.types import Ageing

MOST_PAGES = 64  # that become one


class TokenEvictionOptions(RetentionOptions):
    """Of several older pages, each KV head keeps the tokens that the calibrated distribution of
    queries will attend to most, as many as one page holds.
    """

    name: Literal["token_eviction"] = "token_eviction"
    pages: int = Field(4, ge=2, le=MOST_PAGES, description="older pages of a shard that become one")
    young: int = Field(2, ge=0, description="newest pages of a shard that stay as they are")
    horizon: int = Field(512, ge=1, description="tokens behind a key that queries are expected in")

    needs_calibration: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = False

    def at_share(self, share, num_shards):
        pages = Fraction(share).limit_denominator(1000)
        if pages.numerator > 1 or not 2 <= pages.denominator <= MOST_PAGES:
            raise ValueError(
                f"retention {self.name} makes one of 2 to {MOST_PAGES} pages, and {share:g} is "
                f"none of 1/2, 1/3 ... 1/{MOST_PAGES}: leave that share out"
            )
        return self.model_copy(update={"pages": pages.denominator})

    def build(self, fitted=None):
        queries = ExpectedQueries.of(fitted, self.name, self.horizon)
        return TokenEvictionPolicy(queries, Ageing(self.young, levels=1, pages=self.pages))


class TokenEvictionPolicy(RetentionPolicy):
    """A page holds tokens of every KV head, and they need not be the same: keys were rotated, so
    attention asks no positions. What is dropped is freed, a page at a time.

    Args:
        queries: that are expected.
        ageing: how pages become fewer.
    """

    def __init__(self, queries: ExpectedQueries, ageing: Ageing):
        self._queries, self.ageing = queries, ageing

    def merge(self, keys, values, positions):
        shares = self._queries.logits(keys, values, positions).softmax(dim=3).mean(dim=1)
        best = shares.topk(keys.shape[2] // self.ageing.pages, dim=2).indices.sort(dim=2).values
        return tuple(
            x.gather(2, best.unsqueeze(3).expand(-1, -1, -1, x.shape[3])) for x in (keys, values)
        )
