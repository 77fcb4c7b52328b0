"""What an owner knows of the attention that its pages had.

An owner's softmax is over its own tokens only. A page's share of it times exp(lse_owner - lse_all)
is its share of the whole, and lse_all is known at home, after the merge: it comes with the next
query of the sequence. Until then the owner holds the shares by page number, which survives a change
of columns. A single rank knows the whole at once, and waits too: so a policy knows as much, and
keeps the same pages, whatever the number of ranks.

Legend: n sequences, sq queries of each, np query heads, ng KV heads, k pages read, p pages of the
pool.
"""

import torch
import torch.nn.functional as F

from pikv_megatron.cache.pages.widen import growth_bytes, narrow, widen


class PageStatistics:
    """Attention mass by page and KV head.

    Args:
        num_groups: ng.
        num_heads: np.
        num_slots: sequences of the whole group.
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

    def __init__(
        self, num_groups: int, num_heads: int, num_slots: int, device: torch.device,
        use_threshold: float | None = None,
    ):
        self._use_threshold = use_threshold
        self.mass = torch.zeros(1, num_groups, device=device)
        self.seen = torch.zeros(1, device=device)
        self.observed = torch.full((1,), -1.0, device=device)
        self.last_used = self.uses = None
        if use_threshold is not None:
            self.last_used = torch.full((1,), -1, dtype=torch.int64, device=device)
            self.uses = torch.zeros(1, device=device)
        self._held_page = torch.full((num_slots, 0), -1, dtype=torch.int64, device=device)
        self._held_share = torch.zeros(num_slots, num_heads, 0, device=device)
        self._held_lse = torch.zeros(num_slots, num_heads, device=device)
        self._held_time = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._whole: tuple[torch.Tensor, ...] | None = None

    def widen(self, count: int) -> None:
        """Make room for `count` more pages."""
        self.mass, self.seen, self.observed = (
            widen(t, count, 0) for t in (self.mass, self.seen, self.observed)
        )
        if self.uses is not None:
            self.last_used, self.uses = (widen(t, count, 0) for t in (self.last_used, self.uses))

    def compact(self, kept: torch.Tensor, number: torch.Tensor) -> None:
        """Pages were numbered anew; see `FreeList.compact` for the arguments."""
        self.mass, self.seen, self.observed = (
            narrow(t, kept, 0) for t in (self.mass, self.seen, self.observed)
        )
        if self.uses is not None:
            self.last_used, self.uses = (narrow(t, kept, 0) for t in (self.last_used, self.uses))
        for held in (self._held_page, *(self._whole or ())[:1]):
            held.copy_(torch.where(held < 0, -1, number[held.clamp(min=0)]))

    def growth_bytes(self, count: int) -> int:
        """What `widen` would allocate."""
        return growth_bytes(self._by_page(), len(self.seen), count)

    def reserve_held(self, num_columns: int) -> None:
        """Make room for what steps hold, so that no step has to."""
        missing = num_columns - self._held_page.shape[1]
        if missing > 0:
            self._held_page = F.pad(self._held_page, (0, missing), value=-1)
            self._held_share = F.pad(self._held_share, (0, missing))

    def held_growth_bytes(self, num_columns: int) -> int:
        """What `reserve_held` would allocate."""
        missing = max(0, num_columns - self._held_page.shape[1])
        num_slots, num_heads = self._held_share.shape[:2]
        return missing * num_slots * (
            self._held_page.element_size() + num_heads * self._held_share.element_size()
        )

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

    def hold(
        self, slots: torch.Tensor, pages: torch.Tensor, shares: torch.Tensor, lse: torch.Tensor,
        times: torch.Tensor,
    ) -> None:
        """Keep shares [n, np, k] of this owner's softmax, whose log-sum-exp is lse [n, np], of
        queries at positions times [n]."""
        missing = pages.shape[1] - self._held_page.shape[1]
        self.reserve_held(pages.shape[1])
        self._held_page[slots] = F.pad(pages, (0, max(0, -missing)), value=-1)
        self._held_share[slots] = F.pad(shares, (0, max(0, -missing)))
        self._held_lse[slots] = lse
        self._held_time[slots] = times

    def hold_whole(self, pages: torch.Tensor, shares: torch.Tensor, times: torch.Tensor) -> None:
        """Keep the shares of a step in which this rank had the whole attention."""
        self._whole = pages, shares.unsqueeze(1), times.unsqueeze(1)

    @staticmethod
    def whole_bytes(num_rows: int, num_heads: int, num_columns: int) -> int:
        """What `hold_whole` keeps of so many sequences."""
        return num_rows * (8 + num_columns * (8 + 4 * num_heads))

    def credit_whole(self) -> None:
        """Count what `hold_whole` kept."""
        if self._whole is not None:
            self.add(*self._whole)
            self._whole = None

    def credit(self, slots: torch.Tensor, lse: torch.Tensor) -> None:
        """Count what was held of sequences [n], now that the whole's lse [n, np] is known."""
        pages = self._held_page[slots]
        factor = (self._held_lse[slots] - lse).exp().unsqueeze(2)
        shares = torch.where((pages >= 0).unsqueeze(1), self._held_share[slots] * factor, 0.0)
        self.add(pages, shares.unsqueeze(1), self._held_time[slots].unsqueeze(1))
        self._held_page[slots] = -1

    def forget(self, pages: torch.Tensor, is_dropped: torch.Tensor) -> None:
        """Pages [c], where is_dropped [c], were given back: what is held for them is void."""
        is_gone = torch.zeros_like(self.seen, dtype=torch.bool)
        is_gone[torch.where(is_dropped, pages, len(is_gone) - 1)] = True
        is_gone[-1] = False
        for held in (self._held_page, *(self._whole or ())[:1]):
            held.masked_fill_(is_gone[held], -1)

    def release(self, slot: int) -> None:
        """A sequence ended; its pages are free, and none of them is used again yet."""
        self._held_page[slot] = -1
        self.credit_whole()

    def tensors(self) -> list[torch.Tensor]:
        held = [self._held_page, self._held_share, self._held_lse, self._held_time]
        return self._by_page() + held + list(self._whole or ())

    def _by_page(self) -> list[torch.Tensor]:
        every = [self.mass, self.seen, self.observed, self.last_used, self.uses]
        return [t for t in every if t is not None]

    def _or_null(self, pages: torch.Tensor) -> torch.Tensor:
        """[n * k], the null page where there is none."""
        return torch.where(pages < 0, len(self.seen) - 1, pages).flatten()
