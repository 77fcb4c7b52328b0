"""How much the pages of a step's sequences matter to its queries, by what home knows of them.

Legend: n sequences, np query heads, hn head width, G ranks, m columns of a rank, M = G * m.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch

from pikv_megatron.types import Directory


class PageJudge(ABC):
    """Judges the pages of a step's sequences for their queries, wherever the pages lie."""

    @abstractmethod
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, np, M], estimate of the log of a page's summed exponentials, -inf where there is
        none; and [n, M], the mean over heads of its softmax over the pages, 0 there."""

    @abstractmethod
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, np, M] twice: the log of a page's summed exponentials is at least and at most so
        much, -inf where there is none."""


class Ask:
    """What routers and selectors are asked with; pages are judged once, when first asked for.

    Args:
        query: [n, np, hn], after RoPE.
        slots: [n], int64, slots of the sequences on this rank.
        positions: [n], int64, of the queries.
        directory: of the same n sequences; None where nothing is known of their pages.
        judge: of their pages.
        near_lse: [n, np], log-sum-exp of the logits of what lies at home, in the window; None where
            the selector does not need it.
        layer: number of the layer.
        expert_shares: [n, N], float32, what shards are worth by the experts whose tokens they hold;
            None where pages decide.
    """

    def __init__(
        self, query: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor,
        directory: Directory | None = None, judge: PageJudge | None = None,
        near_lse: torch.Tensor | None = None, layer: int = 0,
        expert_shares: torch.Tensor | None = None,
    ):
        self.query = query
        self.slots = slots
        self.positions = positions
        self.directory = directory
        self.near_lse = near_lse
        self.layer = layer
        self._expert_shares = expert_shares
        self._judge = judge

    @cached_property
    def is_page(self) -> torch.Tensor:
        """[n, M], bool, False marks padding."""
        return self.directory.is_page.flatten(1)

    @property
    def newest(self) -> torch.Tensor:
        """[n, M], int64, position of a page's newest token, any for padding."""
        return self.directory.newest.flatten(1)

    @property
    def page_logits(self) -> torch.Tensor:
        """[n, np, M], -inf where there is no page."""
        return self._scores[0]

    @property
    def page_scores(self) -> torch.Tensor:
        """[n, M], float32, shares of the attention to pages, 0 where there is none."""
        return self._scores[1]

    @cached_property
    def page_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, np, M] twice, see `PageJudge.bounds`."""
        return self._judge.bounds()

    def shard_scores(self) -> torch.Tensor:
        """[n, N], float32, what shards are worth: the shares of their pages, summed, or what
        experts say."""
        if self._expert_shares is not None:
            return self._expert_shares
        return self._by_shard(self.page_scores)

    def shard_pages(self) -> torch.Tensor:
        """[n, N], float32: pages of each shard."""
        return self._by_shard(self.is_page.float())

    def newest_shard(self) -> torch.Tensor | None:
        """[n], int64: the shard that holds the newest page, any without one; None: unknown."""
        if self.directory is None or self.directory.newest is None or not self.is_page.shape[1]:
            return None
        newest = self.newest.masked_fill(~self.is_page, -1).argmax(dim=1, keepdim=True)
        return self.directory.shard.flatten(1).gather(1, newest).squeeze(1)

    def is_left(self, columns: torch.Tensor) -> torch.Tensor:
        """[n, M], bool: the pages that are not among columns [n, k], -1 for none."""
        is_read = torch.zeros_like(self.is_page, dtype=torch.int64)
        is_read.scatter_add_(1, columns.clamp(min=0), (columns >= 0).long())
        return self.is_page & (is_read == 0)

    def left_lse(self, columns: torch.Tensor) -> torch.Tensor:
        """[n, np]: the log of the summed exponentials of the pages that are not among columns
        [n, k] is at most so much."""
        is_left = self.is_left(columns).unsqueeze(1)
        return self.page_bounds[1].masked_fill(~is_left, -torch.inf).logsumexp(dim=2)

    @cached_property
    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._judge.scores()

    def _by_shard(self, values: torch.Tensor) -> torch.Tensor:
        shard = self.directory.shard.flatten(1)
        return values.new_zeros(len(values), self.directory.num_shards).scatter_add_(
            1, shard, values
        )
