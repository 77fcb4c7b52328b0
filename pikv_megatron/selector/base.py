"""Which pages of the visited shards a query reads.

Legend: n sequences, M columns of all ranks together.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.options import Options
from pikv_megatron.relevance import Ask


class PageSelector(ABC):
    """Chooses pages by what the home rank remembers of them: no collective is needed."""

    @abstractmethod
    def num_columns(self, most_pages: int) -> int:
        """k, for so many columns of all ranks: known before anything is scored."""

    @abstractmethod
    def select(self, ask: Ask, may_read: torch.Tensor, most_pages: int) -> torch.Tensor:
        """Choose pages for each sequence.

        Args:
            may_read: [n, M], bool, pages of the visited shards.
            most_pages: at least the pages that any sequence of any rank has on all ranks together.

        Returns:
            [n, k], int64, columns out of M, -1 for none; k is `num_columns`, the same on all
            ranks.
        """


class SelectorOptions(Options):
    """Parameters of a selector."""

    tail: Literal["none", "mean"] = Field(
        "none", description="pages that are not read: `none` leaves them out; `mean` counts each "
        "by its estimated mass and its mean value"
    )

    @abstractmethod
    def build(self) -> PageSelector | None:
        """The selector of a layer; None reads every page."""


def ranked(scores: torch.Tensor, may_read: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """The k best columns, falling, the lower column first among equals.

    Args:
        scores: [n, M], float32, not negative.
        may_read: [n, M], bool.

    Returns:
        Columns [n, k] and which of them may be read, [n, k], bool.

    Example:
        Scores 0.2, 0.5, 0.2, 0.1, all but the second to be read, k = 2: columns 0 and 2.
    """
    values, columns = scores.masked_fill(~may_read, -1.0).sort(dim=1, descending=True, stable=True)
    return columns[:, :k], values[:, :k] >= 0
