"""Which pages of a rank stay, and how older ones are stored.

Legend: r sequences, m columns of a sequence, s shards of this rank, S tokens a page.
"""

import torch

from pikv_megatron.cache.owner.ageing import mean_of_pairs, merge_level, old_pages
from pikv_megatron.cache.owner.held_shares import HeldShares
from pikv_megatron.cache.owner.page_masses import PageMasses
from pikv_megatron.cache.owner.pinned import Pinned
from pikv_megatron.cache.owner.store_lists import StoreLists
from pikv_megatron.cache.pages.ledger import PageLedger
from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.cache.pages.page_table import PageTable
from pikv_megatron.cache.placement import Placement
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.retention.base import RetentionPolicy
from pikv_megatron.retention.budget import PageBudget
from pikv_megatron.types import Ageing, PageStats


class PageKeeper:
    """Pools older pages or packs them anew, as the codec says, and drops those that a policy finds
    worth least.

    Args:
        retention: the policy; None: all pages stay.
        budget: how many stay.
        pinned: what is never dropped.
        ageing: the policy's, or the codec's; None: neither merges pages.
        codec: of the pages.
        placement: which shards this rank owns.
        pool: pages.
        table: which of them a sequence has.
        ledger: how many tokens a shard has had.
        masses: of pages; None: nobody asks.
        held: what is not yet counted in them; likewise.
        lists: what is read, which changes with the pages.

    Attributes:
        has_joint_pool: the layers that decide together have one pool, in which they take no more
            than their limits come to.
    """

    def __init__(
        self, retention: RetentionPolicy | None, budget: PageBudget, pinned: Pinned,
        ageing: Ageing | None, codec: PageCodec, placement: Placement, pool: PagePool,
        table: PageTable, ledger: PageLedger, masses: PageMasses | None, held: HeldShares | None,
        lists: StoreLists,
    ):
        self.retention, self.budget = retention, budget
        self._pinned, self._codec = pinned, codec
        self._placement, self._shards = placement, placement.shards_per_rank
        self.pool, self._table, self._ledger = pool, table, ledger
        self._masses, self._held, self._lists = masses, held, lists
        self.has_joint_pool = False
        self._ageing = ageing
        self._merge = mean_of_pairs if ageing is codec.ageing else retention.merge
        self._page_size = pool.position.shape[1]

    def num_columns(self, most_pages: int) -> int:
        """At least the pages that a sequence has here between two flushes, where it has filled at
        most so many."""
        return self._most(most_pages, self.budget.across_layers)

    def num_kept(self, most_pages: int) -> int:
        """The same, the mean over layers that share a pool."""
        return self._most(most_pages, 1 if self.has_joint_pool else self.budget.across_layers)

    def num_old(self, num_columns: int) -> int:
        """Those of a sequence's pages that are stored as older ones are, if all shards have as
        many."""
        older = self._codec.older
        return 0 if older is None else max(0, num_columns - older.young * self._shards)

    @property
    def prunes(self) -> bool:
        """Whether a budget limits the pages that stay."""
        return self.retention is not None and self.retention.ageing is None

    @property
    def drops(self) -> bool:
        """Whether pages are given back before their sequence ends."""
        return self.num_verdicts > 0

    @property
    def sums_layers(self) -> bool:
        """Whether layers of the same policy keep the same pages."""
        policy = self.retention
        return policy is not None and policy.sums_layers and not policy.keeps_none

    @property
    def joins_layers(self) -> bool:
        """Whether what stays is decided for layers together, behind the last of them."""
        return self.sums_layers or self.prunes and self.budget.joins_layers

    @property
    def num_verdicts(self) -> int:
        """Lists of dropped columns that a flush gives: one a level of ageing, one of a budget."""
        return self._num_levels + self.prunes

    def age(self, slots: torch.Tensor, most_pages: int) -> list[torch.Tensor]:
        """Merge older pages of sequences [r]; see `prune` for what is returned, level by level."""
        drops = []
        for level in range(self._num_levels):
            self._lists.clear()
            pages = self._table.page[slots, :most_pages]
            group, drop = merge_level(
                self._codec, self.pool, slots, pages, self._stats(slots, most_pages),
                self._ageing, level, self._merge,
            )
            if self._masses is not None:
                self._masses.join(*group)
            if self.pool.score is not None:
                self.pool.score[group[0]] = self.pool.score[group].amax(dim=0)
            self.drop(slots, drop)
            drops.append(drop)
        return drops

    def grow_old(self, slots: torch.Tensor, most_pages: int) -> None:
        """Store pages of sequences [r] that are among the newest no longer as older ones."""
        older = self._codec.older
        if older is not None:
            self._lists.clear()
            pages = self._table.page[slots, :most_pages]
            is_old = old_pages(self._stats(slots, most_pages), older.young)
            moved = pages[is_old & (self.pool.place[pages] >= 0)]
            if moved.numel():
                self.pool.grow_old(moved)

    def prune(self, slots: torch.Tensor, most_pages: int) -> torch.Tensor:
        """Drop the pages that the budget does not allow.

        Args:
            slots: [r], int64, each once.
            most_pages: at least the pages that any of them ever filled here.

        Returns:
            [r, m], bool, the columns that were dropped.
        """
        drop = self.retention.drop(*self.rivals(slots, most_pages))
        self.drop(slots, drop)
        return drop

    def rivals(
        self, slots: torch.Tensor, most_pages: int
    ) -> tuple[PageStats, torch.Tensor]:
        """Pages that may go, and how many may stay of those that compete: [r, s], of a shard, or
        [r, 1], of all that this rank has. For arguments see `prune`."""
        stats = self._stats(slots, most_pages)
        filled = self._ledger.num_tokens[:-1].view(-1, self._shards)[slots] // self._page_size
        limit = self.budget.limit(filled)
        if self.budget.across_shards:
            stats = stats._replace(shard=torch.zeros_like(stats.shard))
            limit = limit.sum(dim=1, keepdim=True)
        if self._pinned.num_tokens:
            pages = self._table.page[slots, :most_pages].where(stats.is_page, self.pool.null_page)
            oldest = self.pool.position[pages, 0].long()
            stats, limit = self._pinned.set_aside(stats, oldest, limit)
        return stats, limit

    def drop(self, slots: torch.Tensor, drop: torch.Tensor) -> None:
        """Give pages [r, m] of sequences back."""
        self._lists.clear()
        pages, is_dropped = (x.flatten() for x in self._table.apply(slots, drop))
        if pages.numel():
            self.pool.release_some(pages, is_dropped)
            if self._held is not None:
                self._held.forget(pages, is_dropped)

    @property
    def _num_levels(self) -> int:
        """Times that pages are merged as they age."""
        return 0 if self._ageing is None else self._ageing.levels

    def _most(self, most_pages: int, times: float) -> int:
        """With a budget, at most so many times what it allows."""
        if self._ageing is not None:
            most_pages = self._ageing.most(most_pages, self._shards)
        if not self.prunes:
            return most_pages
        if self.retention.keeps_none:
            return min(most_pages, self._pinned.most_pages)
        most_kept = self.budget.most(most_pages, self._shards) * times
        return min(most_pages, int(most_kept) + self._pinned.most_pages)

    def _stats(self, slots: torch.Tensor, num_columns: int) -> PageStats:
        is_page = self._table.is_page(slots, num_columns)
        pages = torch.where(is_page, self._table.page[slots, :num_columns], self.pool.null_page)
        newest = self.pool.position[pages, -1].long()
        shard = self._placement.local_shard(self.pool.shard[pages].long())
        score = None if self.pool.score is None else self.pool.score[pages]
        stats = PageStats(is_page, newest, shard, score=score)
        if self._masses is None:
            return stats
        return stats._replace(**{
            name: book[pages] for name, book in self._masses.books().items()
        })
