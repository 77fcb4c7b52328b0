"""What is known of the attention that pages had, by page and KV head.

Legend: n sequences, sq queries of each, np query heads, ng KV heads, k pages read, p pages of the
pool.
"""

from collections.abc import Callable

import torch

from pikv_megatron.cache.pages.widen import growth_bytes, narrow, widen

BOOKS = ("mass", "seen", "observed", "last_used", "uses")


class PageMasses:
    """Books of a pool's pages, as long as the pool's own.

    Args:
        num_groups: ng.
        use_threshold: share of a query's attention, mean over heads, from which a page counts as
            used; None: uses are not counted.

    Attributes:
        mass: [p + 1, ng], float32, summed over queries and the heads of a group; the null page's,
            the last one's, is anything, here and below.
        seen: [p + 1], float32, queries that it was summed over.
        observed: [p + 1], float32, mean share that the latest prompt's last queries gave a page;
            -1: none has seen it.
        last_used: [p + 1], int64, position of the last query that used a page; -1: none did.
        uses: [p + 1], float32, queries that did.
    """

    def __init__(self, num_groups: int, device: torch.device, use_threshold: float | None = None):
        self._use_threshold = use_threshold
        self.mass = torch.zeros(1, num_groups, device=device)
        self.seen = torch.zeros(1, device=device)
        self.observed = torch.full((1,), -1.0, device=device)
        self.last_used = self.uses = None
        if use_threshold is not None:
            self.last_used = torch.full((1,), -1, dtype=torch.int64, device=device)
            self.uses = torch.zeros(1, device=device)

    def widen(self, count: int) -> None:
        """Make room for `count` more pages."""
        self._resize(lambda book: widen(book, count, 0))

    def compact(self, kept: torch.Tensor) -> None:
        """Pages `kept` [k] stay; see `FreeList.compact`."""
        self._resize(lambda book: narrow(book, kept, 0))

    def growth_bytes(self, count: int) -> int:
        """What `widen` would allocate."""
        return growth_bytes(self.tensors(), len(self.seen), count)

    def start(self, pages: torch.Tensor) -> None:
        """Pages [c] were sealed."""
        self.mass[pages] = 0.0
        self.seen[pages] = 0.0
        self.observed[pages] = -1.0
        if self.uses is not None:
            self.last_used[pages] = -1
            self.uses[pages] = 0.0

    def join(self, pages: torch.Tensor, others: torch.Tensor) -> None:
        """Pages [c] now hold what `others` [c] held, too."""
        self.mass[pages] += self.mass[others]
        both = self.observed[pages].clamp(min=0) + self.observed[others].clamp(min=0)
        is_observed = (self.observed[pages] >= 0) | (self.observed[others] >= 0)
        self.observed[pages] = torch.where(is_observed, both, -1.0)
        if self.uses is not None:
            # A query may have used both.
            for each in (self.last_used, self.uses):
                each[pages] = torch.maximum(each[pages], each[others])

    def add(self, pages: torch.Tensor, shares: torch.Tensor, times: torch.Tensor) -> None:
        """Count shares of the whole attention.

        Args:
            pages: [n, k], int64, -1 where nothing is read.
            shares: [n, sq, np, k].
            times: [n, sq], int64, positions of the queries.
        """
        pages = self._or_null(pages)
        by_group = shares.sum(dim=1).unflatten(1, (self.mass.shape[1], -1)).sum(dim=2)
        self.mass.index_add_(0, pages, by_group.transpose(1, 2).flatten(0, 1))
        self.seen.index_add_(0, pages, self.seen.new_full((len(pages),), shares.shape[1]))
        if self.uses is not None:
            is_used = shares.mean(dim=2) >= self._use_threshold
            last = torch.where(is_used, times.unsqueeze(2), -1).amax(dim=1)
            self.last_used.scatter_reduce_(0, pages, last.flatten(), "amax")
            self.uses.index_add_(0, pages, is_used.sum(dim=1).flatten().float())

    def observe(self, pages: torch.Tensor, shares: torch.Tensor, times: torch.Tensor) -> None:
        """Count shares that the last queries of a prompt gave; arguments as of `add`."""
        self.add(pages, shares, times)
        self.observed[self._or_null(pages)] = shares.mean(dim=(1, 2)).flatten()

    def books(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        every = {name: getattr(self, name) for name in BOOKS}
        return {name: book for name, book in every.items() if book is not None}

    def tensors(self) -> list[torch.Tensor]:
        return list(self.books().values())

    def _resize(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put changed books in the place of those that there are."""
        for name, book in self.books().items():
            setattr(self, name, change(book))

    def _or_null(self, pages: torch.Tensor) -> torch.Tensor:
        """[n * k], the null page where there is none."""
        return torch.where(pages < 0, len(self.seen) - 1, pages).flatten()
