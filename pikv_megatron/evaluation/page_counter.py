"""Counts what is read from shards: the pages that owners are asked for, not those configured."""

from collections.abc import Callable
from functools import partial

import torch

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.shard_store import ShardStore
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
        layers = list(context.layers.values())
        self._num_layers, self._device = len(layers), layers[0].spec.kv.device
        # A layer with a sliding window has no pages: its counts stay 0.
        self._stores = {i: x.store for i, x in enumerate(layers) if isinstance(x, LayerCache)}
        self.is_on = False
        self.reset()
        for index, store in self._stores.items():
            store.on_read = partial(self._count_read, index)

    def reset(self) -> None:
        """Count from zero."""
        self.read, self.held, self.kept, self.sealed = torch.zeros(
            4, self._num_layers, dtype=torch.int64, device=self._device
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
        self.sealed += self._by_layer(lambda store: store.ledger.num_pages)

    def _pages(self) -> torch.Tensor:
        return self._by_layer(lambda store: store.table.count)

    def _by_layer(self, pages: Callable[[ShardStore], torch.Tensor]) -> torch.Tensor:
        """[layers], the pages of all sequences."""
        counts = torch.zeros_like(self.held)
        for index, store in self._stores.items():
            counts[index] = pages(store).sum()
        return counts

    def _count_read(self, index: int, sealed: PageList) -> None:
        if self.is_on:
            self.read[index] += (sealed.lens > 0).sum()
