"""Which pages of a pool are free: a stack on the device, and a bound that the host knows."""

import torch


class FreeList:
    """Hands out page numbers 0 to `num_pages` - 1.

    Attributes:
        num_pages: pages of the pool, free or not.
    """

    def __init__(self, device: torch.device):
        self.num_pages = 0
        # One place more takes writes that are to be lost.
        self._free = torch.empty(1, dtype=torch.int64, device=device)
        self._num_free = torch.zeros((), dtype=torch.int64, device=device)
        self._free_at_least = 0  # host's lower bound on _num_free, spares a synchronisation

    @property
    def num_free(self) -> int:
        # Where none is handed out, the device need not be asked.
        is_known = self._free_at_least == self.num_pages
        return self.num_pages if is_known else int(self._num_free)

    def missing(self, count: int) -> int:
        """How many pages must be added before `count` are surely free."""
        if self._free_at_least < count:
            self._free_at_least = self.num_free
        return max(0, count - self._free_at_least)

    def growth_bytes(self, count: int) -> int:
        """What `count` more pages take here."""
        return count * self._free.element_size()

    def add(self, count: int) -> None:
        """Add pages `num_pages` to `num_pages + count - 1`."""
        free = self.pages()
        first, last = self.num_pages - 1, self.num_pages + count - 1
        new = torch.arange(last, first, -1, device=free.device)
        spare = free.new_empty(self.num_pages - free.numel() + 1)
        # Older pages lie on top of the stack, so that a sequence's pages tend to be neighbours.
        self._free = torch.cat([new, free, spare])
        self._num_free += count
        self._free_at_least += count
        self.num_pages += count

    def allocate(self, is_used: torch.Tensor) -> torch.Tensor:
        """A page for every True of [c]; the others get `num_pages`. As many are surely free."""
        assert self._free_at_least >= is_used.numel()
        order = torch.cumsum(is_used, 0)
        top = (self._num_free - order).clamp_(min=0)
        pages = torch.where(is_used, self._free[top], self.num_pages)
        self._num_free -= order[-1]
        self._free_at_least -= is_used.numel()
        return pages

    def release(self, pages: torch.Tensor) -> None:
        """Take pages [c] back; they are handed out again in the order given."""
        first = self.num_free
        self._free[first : first + pages.numel()] = pages.flip(0)
        self._num_free += pages.numel()
        self._free_at_least += pages.numel()

    def release_some(self, pages: torch.Tensor, is_released: torch.Tensor) -> None:
        """Take back the pages [c] for which is_released [c] is True, whose number only the device
        knows."""
        order = torch.cumsum(is_released, 0)
        place = torch.where(is_released, self._num_free + order - 1, self.num_pages)
        self._free[place] = pages
        self._num_free += order[-1]

    def compact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Let no page be free, and number those in use anew.

        Returns:
            Those in use [k], rising, whose numbers are 0 to k - 1 now; and the new number of every
            old one and of the null page, [num_pages + 1].
        """
        is_used = torch.ones(self.num_pages, dtype=torch.bool, device=self._free.device)
        is_used[self.pages()] = False
        kept = is_used.nonzero().squeeze(1)
        number = kept.new_full((self.num_pages + 1,), len(kept))
        number[kept] = torch.arange(len(kept), device=kept.device)
        self.num_pages, self._free_at_least = len(kept), 0
        self._free = self._free.new_empty(len(kept) + 1)
        self._num_free.zero_()
        return kept, number

    def pages(self) -> torch.Tensor:
        """The free pages."""
        return self._free[: self.num_free]

    def tensors(self) -> list[torch.Tensor]:
        return [self._free, self._num_free]
