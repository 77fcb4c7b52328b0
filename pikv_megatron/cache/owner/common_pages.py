"""A pool and what is counted of its pages, for one layer or for several that decide together.

Layers that have their budgets together move pages among them. With a pool each, every one would
need room for the most that it may come to have; one pool needs room for what they have together.
"""

from collections.abc import Iterable
from typing import Protocol

import torch

from pikv_megatron.cache.owner.page_masses import PageMasses
from pikv_megatron.cache.pages.page_pool import PagePool


class Sharer(Protocol):
    """A layer's part in them."""

    def forget_lists(self) -> None:
        """Pages may lie elsewhere than before."""

    def renumber(self, number: torch.Tensor) -> None:
        """Every page has a new number, [old pages + 1]."""

    def used_pages(self) -> torch.Tensor:
        """Numbers of the pages of all its sequences."""


class CommonPages:
    """Grows, shrinks and counts both for all that share them.

    Args:
        pool: pages, none of them used.
        masses: as many; None: nobody asks.

    Attributes:
        sharers: the layers, the first of which counts the bytes.
    """

    def __init__(self, pool: PagePool, masses: PageMasses | None):
        self.pool, self.masses = pool, masses
        self.sharers: list[Sharer] = []

    @classmethod
    def for_layer(
        cls, pool: PagePool, masses: PageMasses | None, others: "Iterable[CommonPages]"
    ) -> "CommonPages":
        """Those of other layers whose pages are alike; if there are none, the layer's own."""
        alike = (other for other in others if other.pool.is_like(pool))
        return next(alike, None) or cls(pool, masses)

    def reserve(self, num_pages: int, num_old: int = 0) -> None:
        """As `ShardStore.reserve`, of all layers together."""
        self._clear()
        grown = self.pool.reserve(num_pages, num_old)
        if grown and self.masses is not None:
            self.masses.widen(grown)

    def growth_bytes(self, num_pages: int, num_old: int = 0) -> int:
        """What `reserve` would allocate."""
        own = self.pool.growth_bytes(num_pages, num_old)
        if self.masses is None:
            return own
        return own + self.masses.growth_bytes(self.pool.free.missing(num_pages))

    def compact(self) -> None:
        """Give back the memory of free pages."""
        self._clear()
        kept, number = self.pool.compact()
        if self.masses is not None:
            self.masses.compact(kept)
        for sharer in self.sharers:
            sharer.renumber(number)

    def check_integrity(self) -> None:
        """Every page is free or has exactly one sequence and layer."""
        used = [sharer.used_pages() for sharer in self.sharers]
        every = torch.cat([*used, self.pool.free.pages()]).sort().values
        assert torch.equal(every, torch.arange(self.pool.null_page, device=every.device)), (
            "pages lost or held twice"
        )
        self.pool.check_integrity()

    def _clear(self) -> None:
        for sharer in self.sharers:
            sharer.forget_lists()
