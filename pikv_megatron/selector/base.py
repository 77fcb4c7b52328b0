"""Which pages of the visited shards a query reads.

Legend: n sequences, M columns of all ranks together.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from pikv_megatron.options import Options
from pikv_megatron.relevance import Ask


class Sample(NamedTuple):
    """Pages that stand for others.

    Attributes:
        columns: [n, k'], int64, columns out of M, -1 for none.
        log_weight: [n], float32, log of how often each of them counts.
    """

    columns: torch.Tensor
    log_weight: torch.Tensor


class PageSelector(ABC):
    """Chooses pages at home, by what is known of them there.

    Attributes:
        needs_near: it asks for `Ask.near_lse`, so that home attends to its window first, and not
            while queries travel.
        certifies: what it leaves out is bounded, see `Ask.left_lse`.
        samples: it draws further pages.
    """

    needs_near = False
    certifies = False
    samples = False

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


    def num_drawn(self, most_pages: int) -> int:
        """k', for so many columns of all ranks: known before anything is scored."""
        return 0

    def draw(self, ask: Ask, columns: torch.Tensor) -> Sample:
        """Draw pages that stand for all of those that are not among columns [n, k]."""
        raise NotImplementedError


class SelectorOptions(Options):
    """Parameters of a selector.

    Attributes:
        samples: it draws pages that stand for others.
    """

    samples: ClassVar[bool] = False

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
