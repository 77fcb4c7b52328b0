"""Counts what is read from the cache: what owners are asked for, not what is configured."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.step.step_rows import CachedSequence
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.types import KVPages, PageList


class PageCounter:
    """Stands between a context's layers and this rank's shards, and changes nothing.

    Args:
        context: whose stores are observed from now on.

    Attributes:
        is_on: count what is attended to.
        on_read: told of a layer's number from 0 and of what is read of it; None: nobody asks.
        read: [layers], int64, pages that were read while counting.
        held: [layers], int64, pages that could have been, added up over the same steps.
        kept: [layers], int64, pages that sequences had in the end.
        sealed: [layers], int64, pages that they ever filled.
        read_bytes: [layers], int64, of keys, values, sketches and their metadata that were read,
            the windows' included.
    """

    def __init__(self, context: PiKVInferenceContext):
        layers = list(context.layers.values())
        self._context, self._num_layers = context, len(layers)
        self._device = layers[0].spec.kv.device
        # A layer with a sliding window has no pages: its counts stay 0.
        self._layers = {i: x for i, x in enumerate(layers) if isinstance(x, LayerCache)}
        self.is_on = False
        self.on_read: Callable[[int, OwnerReads, PageList, PageList], None] | None = None
        self.reset()
        for index, layer in self._layers.items():
            layer.store.on_read = partial(self._count_read, index)

    def reset(self) -> None:
        """Count from zero."""
        self.read, self.held, self.kept, self.sealed, self.read_bytes = torch.zeros(
            5, self._num_layers, dtype=torch.int64, device=self._device
        )

    def counts(self) -> list[torch.Tensor]:
        """Pages read, held, kept and sealed, and bytes read, each [layers]."""
        return [self.read, self.held, self.kept, self.sealed, self.read_bytes]

    def count_step(self, own: Sequence[CachedSequence]) -> None:
        """A step begins for this home rank's sequences: every page of this rank could be read."""
        self.held += self._pages()
        sinks = self._context.pikv_config.num_sinks
        in_windows = sum(sinks + sequence.length - sequence.flushed + 1 for sequence in own)
        for index, layer in self._layers.items():
            self.read_bytes[index] += in_windows * layer.spec.kv.token_bytes
            if layer.directory is not None:
                self.read_bytes[index] += _judged_bytes(layer)

    def count_end(self) -> None:
        """The live sequences have been fed."""
        self.kept += self._pages()
        self.sealed += self._by_layer(lambda store: store.ledger.num_pages)

    def _pages(self) -> torch.Tensor:
        return self._by_layer(lambda store: store.table.count)

    def _by_layer(self, pages: Callable[[ShardStore], torch.Tensor]) -> torch.Tensor:
        """[layers], the pages of all sequences."""
        counts = torch.zeros_like(self.held)
        for index, layer in self._layers.items():
            counts[index] = pages(layer.store).sum()
        return counts

    def _count_read(
        self, index: int, reads: OwnerReads, sealed: PageList, opened: PageList
    ) -> None:
        if not self.is_on:
            return
        layer, num_pages = self._layers[index], (sealed.lens > 0).sum()
        self.read[index] += num_pages
        for listed in layer.store.pool.lists(sealed):
            self.read_bytes[index] += (listed.lens > 0).sum() * page_bytes(listed.pages)
        self.read_bytes[index] += opened.lens.sum() * layer.spec.kv.token_bytes
        if self.on_read is not None:
            self.on_read(index, reads, sealed, opened)


def page_bytes(pages: KVPages) -> int:
    """Of keys and values of one page as they are stored, scales included."""
    return sum(t.nbytes for t in pages.tensors) // pages.keys.shape[1]


def _judged_bytes(layer: LayerCache) -> torch.Tensor:
    """What pages are judged by in a step: what home remembers of them, or their keys here."""
    directory, store = layer.directory, layer.store
    if not directory.asks_owners:
        read = [t for t in directory.sketch if isinstance(t, torch.Tensor)]
        page_bytes = sum(t.nbytes for t in read) // len(directory.shard)
        return directory.table.count.sum() * page_bytes
    slots = torch.arange(store.num_slots, device=store.table.count.device)
    every = store.table.is_page(slots, int(store.table.count.max()))
    pages = torch.where(every, store.table.page[:, : every.shape[1]], store.pool.null_page)
    return sum(
        (listed.lens > 0).sum() * _key_bytes(listed.pages)
        for listed in store.pool.lists(PageList(store.pool.kv, pages, every.int()))
    )


def _key_bytes(pages: KVPages) -> int:
    """Of the keys of one page as they are stored, scales included."""
    keys = [t for t in (pages.keys, pages.key_scale, pages.key_zero) if t is not None]
    return sum(t.nbytes for t in keys) // pages.keys.shape[1]
