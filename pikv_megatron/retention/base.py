"""Which sealed pages an owner keeps (paper, section 3.4). What the paper calls a scheduler is a
retention policy here: in serving, a scheduler schedules requests.

Legend: r sequences, m columns.
"""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.options import Options
from pikv_megatron.types import PageStats


class RetentionPolicy(ABC):
    """Says how much each page is worth; the budget says how many stay."""

    @abstractmethod
    def utility(self, stats: PageStats) -> torch.Tensor:
        """[r, m], float32, any where there is no page; of equals the newer page stays."""

    def drop(self, stats: PageStats, limit: torch.Tensor) -> torch.Tensor:
        """Pages to drop, [r, m], bool, so that at most limit [r] of each sequence stay.

        Example:
            Utilities 3, 1, 2 and a limit of 2: the second page is dropped.
        """
        utility = self.utility(stats).masked_fill(~stats.is_page, -torch.inf)
        by_age = stats.newest.masked_fill(~stats.is_page, -1).argsort(dim=1, descending=True)
        best = utility.gather(1, by_age).argsort(dim=1, descending=True, stable=True)
        order = by_age.gather(1, best)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return stats.is_page & (place >= limit.unsqueeze(1))


class RetentionOptions(Options):
    """Parameters of a retention policy."""

    @abstractmethod
    def build(self) -> RetentionPolicy | None:
        """The policy of a layer; None keeps every page."""
