"""Sketches of the pages of one layer's sequences, kept on their home rank wherever the pages lie.

The home rank sends every token to its shard, so it can count along with the owners: it knows which
flush seals a page, and makes the page's sketch itself, without a message from the owner. That costs
a copy of the keys in its own sequences' token buffers. Which pages an owner dropped, it is told.

Legend: ng KV heads, hn head width, S tokens a page, G ranks, n sequences, m columns of a rank.
"""

from typing import NamedTuple

import torch

from pikv_megatron.cache.pages.first_pages import fit_new
from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.ledger import Admission, PageLedger
from pikv_megatron.cache.pages.page_table import PageTable
from pikv_megatron.cache.pages.token_buffer import TokenBuffers
from pikv_megatron.cache.pages.widen import growth_bytes, narrow, narrow_fields, widen, widen_fields
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.ops.attend_means import attend_means
from pikv_megatron.relevance import Ask, PageJudge
from pikv_megatron.sketch.base import PageSketcher
from pikv_megatron.types import AttentionState, Directory, PageSketch


class Listed(NamedTuple):
    """The pages of some sequences.

    Attributes:
        directory: what is known of them.
        lens: [n, M], int32, their tokens, 0 for padding; M = G * m.
    """

    directory: Directory
    lens: torch.Tensor


class NothingKept(NamedTuple):
    """The sketch of a layer whose owners judge pages themselves."""


class SketchJudge(PageJudge):
    """Judges by sketches."""

    def __init__(
        self, query: torch.Tensor, slots: torch.Tensor, listed: Listed, sketcher: PageSketcher,
        sketch: PageSketch, softmax_scale: float,
    ):
        table = listed.directory.table.flatten(1)
        self._asked = query, sketch, table, listed.lens, slots, softmax_scale
        self._sketcher = sketcher

    def scores(self):
        return self._sketcher.logits(*self._asked)

    def bounds(self):
        return self._sketcher.bounds(*self._asked)


class PageDirectory:
    """One row for each (sequence of this rank, owner), which lists pages as the owner does.

    Args:
        spec: the layer; its sketch is what is remembered of a page.
        placement: which rank owns which shard.
        page_size: S.
        num_slots: sequences of this home rank.
        max_pages: most pages that one sequence can fill on one rank.
    """

    def __init__(
        self, spec: LayerSpec, placement: Placement, page_size: int, num_slots: int,
        max_pages: int,
    ):
        kv, device = spec.kv, spec.kv.device
        rows = num_slots * placement.num_ranks
        self._placement = placement
        self._ledger = PageLedger(rows, placement.shards_per_rank, page_size, device)
        self._num_slots = num_slots
        self._page_size = page_size
        self._softmax_scale = spec.softmax_scale
        self._sketcher = spec.options.sketch.build(
            kv, page_size, num_slots, spec.options.selector.needs_bounds
        )
        self._kv, self._mean_value = kv, None
        if spec.options.selector.tail == "mean":
            self._mean_value = torch.zeros(
                kv.num_groups, 1, kv.value_width, dtype=kv.dtype, device=device
            )
        keeps_newest = spec.options.selector.samples or spec.options.router.needs_newest
        metadata = {"position": torch.int64} if keeps_newest else {}
        self._buffers = TokenBuffers(self._ledger, self._remembered(), metadata, kv.dtype, device)
        self.table = PageTable(rows, max_pages, device)
        self._free = FreeList(device)
        # The last entry takes writes that are to be lost.
        self.sketch = NothingKept() if self.asks_owners else self._sketcher.allocate(1)
        self.shard = torch.zeros(1, dtype=torch.int64, device=device)
        self._newest = None
        if keeps_newest:
            self._newest = torch.zeros(1, dtype=torch.int64, device=device)
        # What is listed changes with a flush only.
        self._views: dict[tuple, Listed] = {}

    @property
    def asks_owners(self) -> bool:
        """Whether nothing is remembered of what is in a page, so that its owner has to judge it."""
        return self._sketcher is None

    @property
    def keeps_means(self) -> bool:
        """Whether the tail of a selection can be estimated."""
        return self._mean_value is not None

    def reserve(self, num_pages: int) -> None:
        """See that `num_pages` more pages can be noted."""
        self._views.clear()
        missing = self._free.missing(num_pages)
        if missing:
            self._free.add(missing)
            self.sketch = widen_fields(self.sketch, missing)
            self.shard = widen(self.shard, missing, 0)
            if self._newest is not None:
                self._newest = widen(self._newest, missing, 0)
            if self._mean_value is not None:
                self._mean_value = widen(self._mean_value, missing, 1)

    def compact(self) -> None:
        """Give back the memory of free entries."""
        self._views.clear()
        kept, number = self._free.compact()
        self.table.renumber(number)
        self.sketch, self.shard = narrow_fields(self.sketch, kept), narrow(self.shard, kept, 0)
        if self._newest is not None:
            self._newest = narrow(self._newest, kept, 0)
        if self._mean_value is not None:
            self._mean_value = narrow(self._mean_value, kept, 1)

    def growth_bytes(self, num_pages: int) -> int:
        """What `reserve` would allocate."""
        missing, size = self._free.missing(num_pages), len(self.shard)
        by_page = [t for t in self.sketch if isinstance(t, torch.Tensor)]
        by_page += [self.shard, self._mean_value, self._newest]
        return growth_bytes(by_page, size, missing) + self._free.growth_bytes(missing)

    def admit(self, block: TokenBlock, num_pages: int | None = None) -> Admission:
        """Number tokens, whose `slot` counts over the whole group; `num_pages` as of the ledger."""
        placement = self._placement
        slot = block.slot - placement.rank * self._num_slots
        row = slot * placement.num_ranks + placement.owner(block.shard)
        group = row * placement.shards_per_rank + placement.local_shard(block.shard)
        group = torch.where(block.slot >= 0, group, self._ledger.padding_group)
        return self._ledger.admit(group, num_pages)

    def note(self, block: TokenBlock, admission: Admission) -> None:
        """Take down tokens that leave for their shards."""
        tokens = {name: getattr(block, name) for name in self._buffers.tensors}
        pages = self._buffers.insert(admission, tokens)
        if not admission.is_page.numel():
            return
        is_page, row = admission.is_page, admission.page_row
        self.reserve(is_page.numel())
        place = self._free.allocate(is_page)
        self.table.append(row, admission.page_order, place, is_page)
        slots = row // self._placement.num_ranks
        if not self.asks_owners:
            if self._sketcher.learns:
                fit_new(self._sketcher, slots, is_page, pages["keys"])
            self._sketcher.write(pages["keys"], self.sketch, place, slots)
        local = admission.page_group % self._placement.shards_per_rank
        self.shard[place] = local * self._placement.num_ranks + row % self._placement.num_ranks
        if self._newest is not None:
            self._newest[place] = pages["position"][:, -1]
        if self._mean_value is not None:
            values = self._kv.values_of(pages.get("keys"), pages.get("values"))
            mean = values.float().mean(dim=2)
            self._mean_value[:, place] = mean.to(self._mean_value.dtype)

    def listed(
        self, slots: torch.Tensor, key: tuple[int, ...] | None, num_columns: int
    ) -> Listed:
        """The pages of a step's sequences.

        Args:
            slots: [n], int64, the sequences on this rank.
            key: the same, as the host knows them; None: they change without it.
            num_columns: m.
        """
        view = None if key is None else self._views.get((key, num_columns))
        if view is None:
            view = self._view(slots, num_columns)
            if key is not None:
                self._views[key, num_columns] = view
        return view

    def judge(self, query: torch.Tensor, slots: torch.Tensor, listed: Listed) -> SketchJudge:
        """Of listed pages of the sequences `slots` [n], for query [n, np, hn]."""
        return SketchJudge(
            query, slots, listed, self._sketcher, self.sketch, self._softmax_scale
        )

    def tail(self, ask: Ask, columns: torch.Tensor) -> AttentionState:
        """Attention to the pages that are not read, each by its estimated mass and mean value.

        Args:
            columns: [n, k], int64, the pages that are read, of all ranks; -1 for none.
        """
        return attend_means(
            ask.page_logits, ask.is_left(columns), self._mean_value,
            ask.directory.table.flatten(1),
        )

    def apply(self, slots: torch.Tensor, drop: torch.Tensor) -> None:
        """Forget what owners dropped.

        Args:
            slots: [r], int64, sequences of this rank.
            drop: [r, G, m], bool, by the owners' columns.
        """
        self._views.clear()
        pages, is_dropped = self.table.apply(self._rows(slots).flatten(), drop.flatten(0, 1))
        if pages.numel():
            self._free.release_some(pages.flatten(), is_dropped.flatten())

    def release(self, slot: int) -> None:
        """Forget a sequence of this rank."""
        self._views.clear()
        ranks = self._placement.num_ranks
        for row in range(slot * ranks, (slot + 1) * ranks):
            self._free.release(self.table.pages_of(row))
            self.table.clear(row)
            self._ledger.clear(row)
        if not self.asks_owners:
            self._sketcher.forget(slot)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """All tensors, by what they are for."""
        kept = [*self.sketch, self._mean_value]
        kept += [] if self.asks_owners else self._sketcher.tensors()
        return {
            "sketches": [t for t in kept if isinstance(t, torch.Tensor)],
            "sketch buffers": list(self._buffers.tensors.values()),
            "directory": [
                *self.table.tensors(), *self._ledger.tensors(), self.shard, *self._free.tensors(),
                *([] if self._newest is None else [self._newest]),
            ],
        }

    def check_integrity(self) -> None:
        """Every entry is free or belongs to exactly one row."""
        rows = range(self._num_slots * self._placement.num_ranks)
        used = [self.table.pages_of(row) for row in rows]
        every = torch.cat([*used, self._free.pages()]).sort().values
        assert torch.equal(every, torch.arange(self._free.num_pages, device=every.device)), (
            "directory entries lost or held twice"
        )

    def _rows(self, slots: torch.Tensor) -> torch.Tensor:
        """[n, G], the rows of the sequences `slots` [n]."""
        ranks = self._placement.num_ranks
        return slots.unsqueeze(1) * ranks + torch.arange(ranks, device=slots.device)

    def _remembered(self) -> dict[str, tuple[int, int]]:
        """Heads and width of what is kept of the tokens of open pages, by name."""
        heads, names = self._kv.heads, set()
        if not self.asks_owners:
            names.add("keys")
        if self.keeps_means:
            names.add("keys" if self._kv.values_in_keys else "values")
        return {name: heads[name] for name in heads if name in names}

    def _view(self, slots: torch.Tensor, num_columns: int) -> Listed:
        rows = self._rows(slots)
        is_page = self.table.is_page(rows, num_columns)
        table = torch.where(is_page, self.table.page[rows, :num_columns], self._free.num_pages)
        shard = self.shard[table]
        newest = None if self._newest is None else self._newest[table]
        directory = Directory(table, is_page, shard, self._placement.num_shards, newest)
        return Listed(directory, is_page.flatten(1).int() * self._page_size)
