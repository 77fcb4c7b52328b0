"""Shares of an owner's attention, until it is known what they are of the whole.

An owner's softmax is over its own tokens only. A page's share of it times exp(lse_owner - lse_all)
is its share of the whole, and lse_all is known at home, after the merge: it comes with the next
query of the sequence. Until then the owner holds the shares by page number, which survives a change
of columns. A single rank knows the whole at once, and waits too: so a policy knows as much, and
keeps the same pages, whatever the number of ranks.

Legend: n sequences, np query heads, k pages read.
"""

import torch
import torch.nn.functional as F

from pikv_megatron.cache.owner.page_masses import PageMasses


class HeldShares:
    """Of the last step of each sequence, in one layer.

    Args:
        masses: what they are counted in.
        num_heads: np.
        num_slots: sequences of the whole group.
    """

    def __init__(
        self, masses: PageMasses, num_heads: int, num_slots: int, device: torch.device
    ):
        self._masses = masses
        self._page = torch.full((num_slots, 0), -1, dtype=torch.int64, device=device)
        self._share = torch.zeros(num_slots, num_heads, 0, device=device)
        self._lse = torch.zeros(num_slots, num_heads, device=device)
        self._time = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._whole: tuple[torch.Tensor, ...] | None = None

    def reserve(self, num_columns: int) -> None:
        """Make room for what steps hold, so that no step has to."""
        missing = num_columns - self._page.shape[1]
        if missing > 0:
            self._page = F.pad(self._page, (0, missing), value=-1)
            self._share = F.pad(self._share, (0, missing))

    def growth_bytes(self, num_columns: int) -> int:
        """What `reserve` would allocate."""
        missing = max(0, num_columns - self._page.shape[1])
        num_slots, num_heads = self._share.shape[:2]
        return missing * num_slots * (
            self._page.element_size() + num_heads * self._share.element_size()
        )

    def renumber(self, number: torch.Tensor) -> None:
        """Name every page by its new number [old pages + 1]."""
        for held in (self._page, *(self._whole or ())[:1]):
            held.copy_(torch.where(held < 0, -1, number[held.clamp(min=0)]))

    def hold(
        self, slots: torch.Tensor, pages: torch.Tensor, shares: torch.Tensor, lse: torch.Tensor,
        times: torch.Tensor,
    ) -> None:
        """Keep shares [n, np, k] of this owner's softmax, whose log-sum-exp is lse [n, np], of
        queries at positions times [n]."""
        missing = pages.shape[1] - self._page.shape[1]
        self.reserve(pages.shape[1])
        self._page[slots] = F.pad(pages, (0, max(0, -missing)), value=-1)
        self._share[slots] = F.pad(shares, (0, max(0, -missing)))
        self._lse[slots] = lse
        self._time[slots] = times

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
            self._masses.add(*self._whole)
            self._whole = None

    def credit(self, slots: torch.Tensor, lse: torch.Tensor) -> None:
        """Count what was held of sequences [n], now that the whole's lse [n, np] is known."""
        pages = self._page[slots]
        factor = (self._lse[slots] - lse).exp().unsqueeze(2)
        shares = torch.where((pages >= 0).unsqueeze(1), self._share[slots] * factor, 0.0)
        self._masses.add(pages, shares.unsqueeze(1), self._time[slots].unsqueeze(1))
        self._page[slots] = -1

    def forget(self, pages: torch.Tensor, is_dropped: torch.Tensor) -> None:
        """Pages [c], where is_dropped [c], were given back: what is held for them is void."""
        is_gone = torch.zeros_like(self._masses.seen, dtype=torch.bool)
        is_gone[torch.where(is_dropped, pages, len(is_gone) - 1)] = True
        is_gone[-1] = False
        for held in (self._page, *(self._whole or ())[:1]):
            held.masked_fill_(is_gone[held], -1)

    def release(self, slot: int) -> None:
        """A sequence ended; its pages are free, and none of them is used again yet."""
        self._page[slot] = -1
        self.credit_whole()

    def tensors(self) -> list[torch.Tensor]:
        return [self._page, self._share, self._lse, self._time, *(self._whole or ())]
