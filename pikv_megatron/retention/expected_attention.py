"""Keys that later queries will look for stay (Expected Attention, arXiv 2510.00636).

Legend: np query heads, ng KV heads, g = np / ng, c pages, S tokens a page, r sequences, m columns.
"""

from typing import ClassVar, Literal

from pydantic import Field

from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy, share_of_shard
from pikv_megatron.retention.expected_queries import ExpectedQueries


class ExpectedAttentionOptions(RetentionOptions):
    """Pages whose keys the calibrated distribution of queries will attend to most stay."""

    name: Literal["expected_attention"] = "expected_attention"
    horizon: int = Field(512, ge=1, description="tokens behind a key that queries are expected in")

    needs_calibration: ClassVar[bool] = True

    def build(self, fitted=None):
        return ExpectedAttentionPolicy(ExpectedQueries.of(fitted, self.name, self.horizon))


class ExpectedAttentionPolicy(RetentionPolicy):
    """A page's score is known when it is sealed, and holds for decoded tokens, too; heads are
    equals, each with its softmax over the pages of a shard.

    Args:
        queries: that are expected.
    """

    def __init__(self, queries: ExpectedQueries):
        self._queries = queries
        self.num_scores = queries.num_heads

    def score_pages(self, keys, values, positions):
        logits = self._queries.logits(keys, values, positions)
        return logits.flatten(0, 1).logsumexp(dim=2).T

    def utility(self, stats):
        return share_of_shard(stats, stats.score)
