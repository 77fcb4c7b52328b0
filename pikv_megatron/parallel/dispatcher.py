"""How rows of numbers travel between the ranks of the expert-parallel group, whatever they mean.

Legend: n rows of this home rank, R rows that came to this owner, G ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

QUERY_OP, COMBINE_OP, FLUSH_OP = "pikv_query", "pikv_combine", "pikv_flush"


@dataclass
class Route:
    """Which rows went where.

    Attributes:
        counts: rows of each home rank, known to all.
        num_rows: n.
        sent: rows to each owner.
        received: rows from each home rank.
        places: [sent rows, 2] int64, owner and row of each; None: every row went to all.
        work: a collective to wait for.
        arrived: what it fills.
    """

    counts: Sequence[int]
    num_rows: int
    sent: list[int] | None = None
    received: list[int] | None = None
    places: torch.Tensor | None = None
    work: Any = None
    arrived: torch.Tensor | None = None


class KVDispatcher(ABC):
    """Brings rows to owners, their results home, and tokens to their shards.

    Args:
        num_ranks: G.
        rank: this one.
    """

    def __init__(self, num_ranks: int, rank: int):
        self.num_ranks = num_ranks
        self.rank = rank

    def everywhere(self, counts: Sequence[int]) -> Route:
        """The route of rows that all owners have, of which counts [G] are each home rank's."""
        own = counts[self.rank]
        return Route(counts, own, [own] * self.num_ranks, list(counts))

    @abstractmethod
    def post(
        self, rows: torch.Tensor, own: torch.Tensor | None, counts: Sequence[int],
        goes_to: torch.Tensor | None = None,
    ) -> Route:
        """Start sending rows to owners.

        Args:
            rows: [n, ...], the same for every owner.
            own: [n, G, w], int32, what each owner gets besides; None for nothing.
            counts: rows of each home rank.
            goes_to: [n, G], bool, owners that need a row; None: all do. A dispatcher may send
                more.
        """

    @abstractmethod
    def wait(
        self, route: Route, rows: torch.Tensor, own: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What came: rows [R, ...] and own [R, w], by home rank; types are those of the arguments,
        which are what was posted."""

    @abstractmethod
    def give_back(
        self, route: Route, results: torch.Tensor, name: str = COMBINE_OP
    ) -> torch.Tensor:
        """Results [R, ...], float32 or int32 -> [G, n, ...] on the home ranks, -inf where a row
        did not go."""

    @abstractmethod
    def send(
        self, rows: torch.Tensor, owner: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Send each of rows [t, bytes] to its owner [t]; returns what came, at least that.

        Args:
            counts: rows of each home rank.
        """


class LocalDispatcher(KVDispatcher):
    """One rank owns everything: the oracle of the others."""

    def __init__(self):
        super().__init__(1, 0)

    def post(self, rows, own, counts, goes_to=None):
        return self.everywhere(counts)

    def wait(self, route, rows, own):
        return rows, None if own is None else own[:, 0]

    def give_back(self, route, results, name=COMBINE_OP):
        return results.unsqueeze(0)

    def send(self, rows, owner, counts):
        return rows
