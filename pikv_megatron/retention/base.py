"""Which sealed pages an owner keeps (paper, section 3.4). What the paper calls a scheduler is a
retention policy here: in serving, a scheduler schedules requests.

Pages of a shard compete with each other only, so what stays does not depend on which shards a rank
has, unless the budget says otherwise. The first tokens of a sequence are never in a page: they stay
in its stream window.

Legend: r sequences, m columns, s shards of the rank, ng KV heads, c pages, S tokens a page, w and
w_v widths of keys and values.
"""

from abc import abstractmethod
from typing import ClassVar, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field

from pikv_megatron.options import Options
from pikv_megatron.retention.prompt import Prompt
from pikv_megatron.types import Ageing, PageStats, TierPlan


class RetentionPolicy:
    """Says how much each page is worth; the budget says how many stay.

    Attributes:
        num_scores: numbers that are kept of a page from when it is sealed, `PageStats.score`.
        keeps_none: whatever the budget allows, no page of this layer stays.
        ageing: how older pages become fewer, instead of a budget; None: pages stay or go whole.
        sums_layers: layers of the same policy sum up what a page is worth to each, and keep the
            same pages; those that keep none decide by themselves.
    """

    num_scores: int = 0
    keeps_none: bool = False
    ageing: Ageing | None = None
    sums_layers: bool = False

    def utility(self, stats: PageStats) -> torch.Tensor:
        """[r, m], float32, any where there is no page; of equals the newer page stays. Asked of
        policies without `ageing`."""
        raise NotImplementedError

    def score(self, prompt: Prompt) -> torch.Tensor:
        """[t], float32, of a prompt's tokens; asked of policies that `needs_scores`."""
        raise NotImplementedError

    def score_pages(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[c, num_scores], float32, of pages that are sealed; asked of policies that have scores
        and do not take them from prompts.

        Args:
            keys: [ng, c, S, w], rotated, before they are compressed.
            values: [ng, c, S, w_v].
            positions: [c, S].
        """
        raise NotImplementedError

    def merge(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stays of groups of pages that become one; asked of policies with `ageing`.

        Args:
            keys: [ng, c, pages * S, w], rotated.
            values: [ng, c, pages * S, w_v].
            positions: [c, pages * S].

        Returns:
            Keys and values, [ng, c, S, w] and [ng, c, S, w_v].
        """
        raise NotImplementedError

    def drop(self, stats: PageStats, limit: torch.Tensor) -> torch.Tensor:
        """Pages to drop, [r, m], bool, so that at most limit [r, s] of each shard stay.

        Example:
            Utilities 3, 1, 2 in one shard and a limit of 2: the second page is dropped.
        """
        return beyond(stats, self.utility(stats), limit)


class RetentionOptions(Options):
    """Parameters of a retention policy.

    Attributes:
        takes_budget: whether a budget says how many pages stay.
    """

    takes_budget: ClassVar[bool] = True

    @abstractmethod
    def build(self, fitted: Mapping[str, torch.Tensor] | None = None) -> RetentionPolicy | None:
        """The policy of a layer; None keeps every page.

        Args:
            fitted: what was calibrated of the layer, by name; None: nothing was.

        Raises:
            ValueError: the policy lacks something; names it and the remedy.
        """

    @property
    def tiers(self) -> TierPlan | None:
        """Where pages lie that all stay; None: where they are computed."""
        return None

    @property
    def use_threshold(self) -> float | None:
        """Share of a query's attention, mean over heads, from which a page counts as used; None:
        uses are not counted."""
        return None


class ObservingOptions(RetentionOptions):
    """Parameters of a policy that judges pages by what they had of the attention."""

    observation_window: int = Field(
        32, ge=1, description="last queries of a prompt (or chunk) that every page is judged by"
    )

    needs_mass: ClassVar[bool] = True


def beyond(
    stats: PageStats, utility: torch.Tensor, limit: torch.Tensor
) -> torch.Tensor:
    """[r, m], bool: the pages that are not among the limit [r, s] best of their shard."""
    is_over = place(stats, utility) > limit.gather(1, stats.own_shard)
    return stats.is_page & is_over


def best_first(stats: PageStats, utility: torch.Tensor) -> torch.Tensor:
    """[r, m], int64: columns by falling utility, the newer first among equals, padding last; of
    pages as old, of two layers say, the first column."""
    newest = stats.newest.masked_fill(~stats.is_page, -1)
    by_age = newest.argsort(dim=1, descending=True, stable=True)
    utility = utility.masked_fill(~stats.is_page, -torch.inf)
    return by_age.gather(1, utility.gather(1, by_age).argsort(dim=1, descending=True, stable=True))


def place(stats: PageStats, utility: torch.Tensor) -> torch.Tensor:
    """[r, m], int64: the place of each page among those of its shard, from 1 for the best."""
    order = best_first(stats, utility)
    places = running(torch.ones_like(order), stats.own_shard.gather(1, order))
    return torch.empty_like(order).scatter_(1, order, places)


def share_of_shard(stats: PageStats, logits: torch.Tensor) -> torch.Tensor:
    """[r, m]: the share of each page in the softmax over the pages of its shard, mean over heads.

    Args:
        logits: [r, m, heads].
    """
    if logits.numel() == 0:
        return logits.sum(dim=2)
    is_own = F.one_hot(stats.own_shard).bool() & stats.is_page.unsqueeze(2)
    by_shard = logits.unsqueeze(3).masked_fill(~is_own.unsqueeze(2), -torch.inf)
    return by_shard.softmax(dim=1).nan_to_num().sum(dim=3).mean(dim=2)


def running(values: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """Sums [r, m] of values [r, m] up to each column, over the columns of its own shard [r, m].

    Example:
        Values 1, 2, 4 in shards 0, 1, 0: 1, 2, 5.
    """
    if shard.numel() == 0:
        return values
    by_shard = F.one_hot(shard) * values.unsqueeze(2)
    return by_shard.cumsum(dim=1).gather(2, shard.unsqueeze(2)).squeeze(2)
