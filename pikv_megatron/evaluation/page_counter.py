"""Counts what is read from shards: the pages that owners are asked for, not those configured."""

from functools import partial

import torch

from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.types import PageList


class PageCounter:
    """Stands between a context's layers and this rank's shards, and changes nothing.

    Args:
        context: whose stores are observed from now on.

    Attributes:
        is_on: count what is attended to.
        read: [layers], int64, pages that were read while counting.
        held: [layers], int64, pages that could have been, added up over the same steps.
        kept: [layers], int64, pages that sequences had in the end.
        sealed: [layers], int64, pages that they ever filled.
    """

    def __init__(self, context: PiKVInferenceContext):
        self._stores = [layer.store for layer in context.sharded_layers]
        self.is_on = False
        self.reset()
        for index, store in enumerate(self._stores):
            store.on_read = partial(self._count_read, index)

    def reset(self) -> None:
        """Count from zero."""
        device = self._stores[0].table.count.device
        self.read, self.held, self.kept, self.sealed = torch.zeros(
            4, len(self._stores), dtype=torch.int64, device=device
        )

    def counts(self) -> list[torch.Tensor]:
        """Pages read, held, kept and sealed, each [layers]."""
        return [self.read, self.held, self.kept, self.sealed]

    def count_step(self) -> None:
        """A step begins: every page of this rank could be read."""
        self.held += self._pages()

    def count_end(self) -> None:
        """The live sequences have been fed."""
        self.kept += self._pages()
        self.sealed += torch.stack([store.ledger.num_pages.sum() for store in self._stores])

    def _pages(self) -> torch.Tensor:
        return torch.stack([store.table.count.sum() for store in self._stores])

    def _count_read(self, index: int, sealed: PageList) -> None:
        if self.is_on:
            self.read[index] += (sealed.lens > 0).sum()
