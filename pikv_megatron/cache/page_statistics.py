"""What an owner knows of the attention that its pages had.

An owner's softmax is over its own tokens only. A page's share of it times exp(lse_owner - lse_all)
is its share of the whole, and lse_all is known at home, after the merge: it comes with the next
query of the sequence. Until then the owner holds the shares by page number, which survives a change
of columns.

Legend: n sequences, np query heads, ng KV heads, g = np / ng, k pages read, p pages of the pool.
"""

import torch
import torch.nn.functional as F

from pikv_megatron.cache.widen import widen


class PageStatistics:
    """Attention mass by page and KV head.

    Args:
        num_groups: ng.
        num_heads: np.
        num_slots: sequences of the whole group.

    Attributes:
        mass: [p + 1, ng], float32, summed over queries and the heads of a group; the null page's,
            the last one's, is anything.
        seen: [p + 1], float32, queries that it was summed over.
    """

    def __init__(self, num_groups: int, num_heads: int, num_slots: int, device: torch.device):
        self.mass = torch.zeros(1, num_groups, device=device)
        self.seen = torch.zeros(1, device=device)
        self._held_page = torch.full((num_slots, 0), -1, dtype=torch.int64, device=device)
        self._held_share = torch.zeros(num_slots, num_heads, 0, device=device)
        self._held_lse = torch.zeros(num_slots, num_heads, device=device)

    def widen(self, count: int) -> None:
        """Make room for `count` more pages."""
        self.mass, self.seen = (widen(t, count, 0) for t in (self.mass, self.seen))

    def start(self, pages: torch.Tensor) -> None:
        """Pages [c] were sealed."""
        self.mass[pages] = 0.0
        self.seen[pages] = 0.0

    def join(self, pages: torch.Tensor, others: torch.Tensor) -> None:
        """Pages [c] now hold what `others` [c] held, too."""
        self.mass[pages] += self.mass[others]

    def add(self, pages: torch.Tensor, shares: torch.Tensor, num_queries: int = 1) -> None:
        """Count shares of the whole attention.

        Args:
            pages: [n, k], int64, -1 where nothing is read.
            shares: [n, np, k], summed over `num_queries` queries.
        """
        pages = torch.where(pages < 0, len(self.seen) - 1, pages)
        by_group = shares.unflatten(1, (self.mass.shape[1], -1)).sum(dim=2)
        self.mass.index_add_(0, pages.flatten(), by_group.transpose(1, 2).flatten(0, 1))
        self.seen.index_add_(0, pages.flatten(), self.seen.new_full((pages.numel(),), num_queries))

    def hold(
        self, slots: torch.Tensor, pages: torch.Tensor, shares: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Keep shares [n, np, k] of this owner's softmax, whose log-sum-exp is lse [n, np]."""
        missing = pages.shape[1] - self._held_page.shape[1]
        if missing > 0:
            self._held_page = F.pad(self._held_page, (0, missing), value=-1)
            self._held_share = F.pad(self._held_share, (0, missing))
        self._held_page[slots] = F.pad(pages, (0, max(0, -missing)), value=-1)
        self._held_share[slots] = F.pad(shares, (0, max(0, -missing)))
        self._held_lse[slots] = lse

    def credit(self, slots: torch.Tensor, lse: torch.Tensor) -> None:
        """Count what was held of sequences [n], now that the whole's lse [n, np] is known."""
        pages = self._held_page[slots]
        factor = (self._held_lse[slots] - lse).exp().unsqueeze(2)
        shares = torch.where((pages >= 0).unsqueeze(1), self._held_share[slots] * factor, 0.0)
        self.add(pages, shares)
        self._held_page[slots] = -1

    def forget(self, pages: torch.Tensor, is_dropped: torch.Tensor) -> None:
        """Pages [c], where is_dropped [c], were given back: what is held for them is void."""
        is_gone = torch.zeros_like(self.seen, dtype=torch.bool)
        is_gone[torch.where(is_dropped, pages, len(is_gone) - 1)] = True
        is_gone[-1] = False
        self._held_page.masked_fill_(is_gone[self._held_page], -1)

    def release(self, slot: int) -> None:
        """A sequence ended."""
        self._held_page[slot] = -1

    def tensors(self) -> list[torch.Tensor]:
        return [self.mass, self.seen, self._held_page, self._held_share, self._held_lse]
