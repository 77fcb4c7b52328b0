"""Pages that are never dropped: those of the first tokens, a system prompt say.

Policies that keep what is attended to drop instructions unevenly (2510.00231).

Legend: r sequences, m columns, s shards of the rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.types import PageStats


class Pinned(NamedTuple):
    """What is pinned of every sequence on one rank.

    Attributes:
        num_tokens: first tokens of a sequence; a page that begins before their end is pinned.
        most_pages: at least the pages that they take.
    """

    num_tokens: int = 0
    most_pages: int = 0

    @classmethod
    def of(cls, num_tokens: int, footprint: Footprint) -> "Pinned":
        """Of tokens of which the first ones are sinks, which are in no page."""
        in_pages = num_tokens - footprint.placement.num_sinks
        if in_pages <= 0:
            return cls()
        # The last page of each shard has begun, too.
        begun = footprint.placement.shards_per_rank
        return cls(num_tokens, footprint.most_pages(in_pages) + begun)

    def set_aside(
        self, stats: PageStats, oldest: Tensor, limit: Tensor
    ) -> tuple[PageStats, Tensor]:
        """The other pages, and how many of them may stay: pinned ones fill the budget first.

        Args:
            stats: of pages [r, m].
            oldest: [r, m], int64, position of each page's first token.
            limit: [r, s], pages that stay.

        Example:
            One shard, pages that begin at 0, 16, 32, a limit of 2 and 10 pinned tokens: the first
            is set aside, and one of the others stays.
        """
        is_pinned = stats.is_page & (oldest < self.num_tokens)
        taken = torch.zeros_like(limit).scatter_add_(1, stats.own_shard, is_pinned.long())
        others = stats._replace(is_page=stats.is_page & ~is_pinned)
        return others, (limit - taken).clamp(min=0)
