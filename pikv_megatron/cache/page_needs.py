"""The pages that sequences come to need, before the first of them is filled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.owner.common_pages import CommonPages
from pikv_megatron.cache.owner.page_keeper import PageKeeper
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.step.step_rows import CachedSequence, WindowLayout


class PageNeeds(NamedTuple):
    """What a layer is to have room for.

    Attributes:
        owned: pages that are to be free on this rank.
        noted: the same of its own sequences on all ranks, for the directory.
        columns: the most pages that any sequence comes to have here.
        old: those of `owned` that are to grow old.
    """

    owned: int
    noted: int
    columns: int
    old: int

    def and_pages_of(self, other: "PageNeeds") -> tuple["PageNeeds", "PageNeeds"]:
        """Both, where this layer's pool is the other's, too."""
        mine = self._replace(owned=self.owned + other.owned, old=self.old + other.old)
        return mine, other._replace(owned=0, old=0)


@dataclass(frozen=True)
class PageForecast:
    """Counts what sequences need on a rank; their tokens are taken to be spread evenly.

    Attributes:
        footprint: of their tokens.
        layout: of the windows that tokens are in first.
        chunk_pages: that a piece of a prompt fills.
        num_ranks: of the group.
        rank: this one.
        max_batch_size: slots of a rank.
    """

    footprint: Footprint
    layout: WindowLayout
    chunk_pages: int
    num_ranks: int
    rank: int
    max_batch_size: int

    def needs(
        self, stores: Sequence[ShardStore], lengths: Sequence[tuple[CachedSequence, int]]
    ) -> list[PageNeeds]:
        """What layers lack until sequences have these many tokens; of layers that share pages, the
        first has all of them."""
        found = [self._of_layer(store.keeper, lengths) for store in stores]
        firsts: dict[CommonPages, int] = {}
        for place, store in enumerate(stores):
            first = firsts.setdefault(store.common, place)
            if first != place:
                found[first], found[place] = found[first].and_pages_of(found[place])
        return found

    def _of_layer(
        self, keeper: PageKeeper, lengths: Sequence[tuple[CachedSequence, int]]
    ) -> PageNeeds:
        owned = noted = old = passing = listed = 0
        for sequence, length in lengths:
            is_home = sequence.slot // self.max_batch_size == self.rank
            here = self._missing(keeper, keeper.num_kept, sequence, length, is_home)
            owned, old = owned + here.stay, old + here.old
            passing += here.pass_on
            if is_home:
                near, far = (
                    self._missing(keeper, keeper.num_columns, sequence, length, at_home)
                    for at_home in (True, False)
                )
                noted += near.stay + (self.num_ranks - 1) * far.stay
                listed += near.go + (self.num_ranks - 1) * far.go
        # What a prompt's chunk fills is dropped, or packed anew, after it was filled.
        owned += min(self.chunk_pages, passing)
        noted += min(self.chunk_pages, listed)
        longest = max((length for _, length in lengths), default=0)
        most = self.footprint.most_pages(self._num_in_shards(longest))
        return PageNeeds(owned, noted, keeper.num_columns(most), old)

    def _missing(
        self, keeper: PageKeeper, kept: Callable[[int], int], sequence: CachedSequence,
        length: int, at_home: bool,
    ) -> "_Missing":
        """Where `kept` says how many stay of so many pages that were filled."""
        filled = self.footprint.enough_pages(self._num_in_shards(length), at_home)
        now = sequence.flushed - self.layout.num_sinks
        wanted = kept(filled)
        held = kept(self.footprint.full_pages(now, at_home))
        old = keeper.num_old(wanted)
        go = filled - wanted
        return _Missing(wanted - held, old - keeper.num_old(held), go, go + old)

    def _num_in_shards(self, length: int) -> int:
        """Tokens in shards of a sequence of `length`, at most."""
        return max(0, length - self.layout.num_sinks - self.layout.window)


class _Missing(NamedTuple):
    """What a sequence needs on a rank besides the pages that it has.

    Attributes:
        stay: pages.
        old: those of them that are to grow old.
        go: pages that it fills and that do not stay.
        pass_on: pages that it fills and that do not stay as they are.
    """

    stay: int
    old: int
    go: int
    pass_on: int
