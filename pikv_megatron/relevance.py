"""How much the pages of a step's sequences matter to its queries, by what home knows of them.

Legend: n sequences, np query heads, hn head width, G ranks, m columns of a rank, M = G * m.
"""

from functools import cached_property
from typing import Callable

import torch

from pikv_megatron.types import Directory

Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Ask:
    """What routers and selectors are asked with; pages are scored once, when first asked for.

    Args:
        query: [n, np, hn], after RoPE.
        slots: [n], int64, slots of the sequences on this rank.
        positions: [n], int64, of the queries.
        directory: of the same n sequences; None where no sketches are kept.
        judge: gives page logits and scores for the query, see `PageSketcher.logits`.
    """

    def __init__(
        self, query: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
        directory: Directory | None = None, judge: Judge | None = None,
    ):
        self.query = query
        self.slots = slots
        self.positions = positions
        self.directory = directory
        self._judge = judge
        self._scored: tuple[torch.Tensor, torch.Tensor] | None = None

    @cached_property
    def is_page(self) -> torch.Tensor:
        """[n, M], bool, False marks padding."""
        return self.directory.is_page.flatten(1)

    @property
    def page_logits(self) -> torch.Tensor:
        """[n, np, M], -inf where there is no page."""
        return self._scores()[0]

    @property
    def page_scores(self) -> torch.Tensor:
        """[n, M], float32, shares of the attention to pages, 0 where there is none."""
        return self._scores()[1]

    def shard_scores(self) -> torch.Tensor:
        """[n, N], float32: the shares of a shard's pages, summed."""
        return self._by_shard(self.page_scores)

    def shard_pages(self) -> torch.Tensor:
        """[n, N], float32: pages of each shard."""
        return self._by_shard(self.is_page.float())

    def _by_shard(self, values: torch.Tensor) -> torch.Tensor:
        shard = self.directory.shard.flatten(1)
        return values.new_zeros(len(values), self.directory.num_shards).scatter_add_(
            1, shard, values
        )

    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._scored is None:
            self._scored = self._judge(self.query)
        return self._scored
