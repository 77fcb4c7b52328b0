"""Pages over three tiers: device, host memory, file (FlexGen, arXiv 2303.06865; paper, Table 3).

A page keeps its number, and what is known of it, wherever its keys and values lie. It is sealed on
the device, where the places are a cache of what was read last: when room is needed, what was read
longest ago leaves, and it comes back when it is read.

What does not fit the device at once is read in rounds, and their attention is merged. What a round
reads follows from what is asked for, and not from what lies where, so the same is computed again.

Legend: p pages, c some of them, n sequences, m columns, d places on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.cache.pages.widen import growth_bytes, narrow, narrow_fields, widen, widen_fields
from pikv_megatron.cache.tiers.disk_tier import Loss
from pikv_megatron.cache.tiers.lower_tiers import LowerTiers
from pikv_megatron.cache.tiers.page_records import from_records, record_bytes, to_records
from pikv_megatron.types import PageList, Recalled, TierPlan

BEHIND = torch.iinfo(torch.int64).max


class TieredPagePool(PagePool):
    """Of a pool of p pages, `kv` holds d. What is read has to be known by the host, which asks the
    device for it once a layer.

    Args:
        plan: where pages lie that are not on the device; the others are as of `PagePool`.

    Attributes:
        most_here: of so many pages, how many lie on the device; to be set: all of them.
        place: [p + 1], int64, where a page lies in `kv`, -1 for one that does not.
        last_read: [p + 1], int64, the number of the reading in which a page was last read.
        lower: pages that are not on the device.
    """

    def __init__(
        self, plan: TierPlan, codec, page_size, has_replicas, num_scores, has_levels, device
    ):
        super().__init__(codec, page_size, has_replicas, num_scores, has_levels, device)
        self._plan = plan
        self.most_here: Callable[[int], int] = lambda num_pages: num_pages
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.last_read = torch.zeros(1, dtype=torch.int64, device=device)
        self.lower = LowerTiers(record_bytes(self.kv), plan.directory, device)
        self._places = FreeList(device)
        self._clock = 0

    @property
    def sizes(self):
        return self.null_page, self.at_once

    @property
    def at_once(self):
        return self._places.num_pages

    def places(self, pages):
        self._make_room(len(pages))
        place = self._places.allocate(pages != self.null_page)
        self.place[pages], self.last_read[pages] = place, self._clock
        return place

    def release(self, pages):
        super().release(pages)
        place = self.place[pages]
        self._places.release(place[place >= 0])
        self.place[pages] = -1
        self.lower.forget(pages.cpu())

    def lists(self, sealed):
        """Of pages that lie on the device, or are to."""
        return [sealed._replace(pages=self.kv, table=self.place[sealed.table].clamp(min=0))]

    def rounds(self, lists: Sequence[PageList]) -> Iterator[list[PageList]]:
        """Lists of pages by their numbers, as they are to be attended to, one round behind the
        other; each page is read in one of them, but for those that are lost."""
        read = torch.cat([each.table[each.lens > 0] for each in lists])
        is_own = torch.ones_like(self.place, dtype=torch.bool)
        for pages in read.split(self.at_once):
            self._hold(pages)
            if len(pages) < len(read):
                is_own.zero_()[pages] = True
            # What is lost did not come.
            is_here = is_own & (self.place >= 0)
            own = [each._replace(lens=each.lens * is_here[each.table]) for each in lists]
            yield [part for each in own for part in self.lists(each)]

    def fetch_ahead(self, pages: torch.Tensor) -> None:
        """Begin to read pages [c], each named once, that may be read next."""
        self.lower.fetch_ahead(pages[self.place[pages] < 0].cpu())

    def losses(self, lists):
        if not self.lower.loss.any():
            return None
        loss = self.lower.loss.to(self.place.device)
        every = torch.cat([loss[each.table] * (each.lens > 0) for each in lists], dim=1)
        return every.amax(dim=1)

    @property
    def stored_bytes(self):
        return super().stored_bytes * (self.null_page + 1) // (self.at_once + 1)

    @property
    def lower_bytes(self):
        return sum(t.nbytes for t in self.lower.tensors()), self.lower.disk.num_bytes

    def take_recalled(self):
        recalled, self.lower.recalled = self.lower.recalled, Recalled()
        return recalled

    def hold_space(self):
        self.lower.disk.hold_space()

    def restore(self, codec, pages, slots):
        parts = []
        for own, slot in zip(pages.split(self.at_once), slots.split(self.at_once)):
            self._hold(own)
            place = self.place[own]
            if bool((place < 0).any()):
                raise ValueError(f"pages {own[place < 0].tolist()} cannot be read again")
            parts.append(codec.restore(self.kv, place, slot, self.position[own]))
        return tuple(torch.cat(part, dim=1) for part in zip(*parts))

    def metadata(self):
        return super().metadata() + [self.place, self.last_read, *self._places.tensors()]

    def check_integrity(self):
        """Every page that is used lies somewhere, once, or is known to be lost."""
        is_used = torch.ones(self.null_page, dtype=torch.bool, device=self.place.device)
        is_used[self.free.pages()] = False
        place, lower = self.place[:-1].cpu(), self.lower
        every = torch.cat([place[place >= 0], self._places.pages().cpu()]).sort().values
        assert torch.equal(every, torch.arange(self.at_once)), "places lost or held twice"
        in_host, in_file = lower.host_row[:-1] >= 0, lower.disk_row[:-1] >= 0
        assert not (in_host & ((place >= 0) | in_file)).any(), "pages lie in two tiers"
        assert torch.equal(is_used.cpu(), (place >= 0) | in_host | in_file), "pages lie nowhere"
        lower.check_integrity()

    def _hold(self, pages: torch.Tensor) -> None:
        """Read pages [c], no more than there are places for: those that are not on the device come,
        as far as they can be read again."""
        self._clock += 1
        self.last_read[pages] = self._clock
        missing = pages[self.place[pages] < 0]
        if len(missing) and self.lower.loss.any():
            loss = self.lower.loss[missing.cpu()]
            missing = missing[(loss == Loss.NONE).to(missing.device)]
        if len(missing):
            start = time.perf_counter()
            self._bring(missing.unique())
            self.lower.recalled += Recalled(seconds=time.perf_counter() - start)

    def _bring(self, pages: torch.Tensor) -> None:
        """Put pages [c], rising, on the device; those that turn out to be lost stay where they
        are."""
        device = self.place.device
        found, records = self.lower.take(pages.cpu())
        if not len(found):
            return
        found, records = found.to(device), records.to(device, non_blocking=True)
        self._make_room(len(found))
        place = self._places.allocate(torch.ones_like(found, dtype=torch.bool))
        from_records(records, self.kv, place)
        self.place[found] = place

    def _make_room(self, count: int) -> None:
        """See that `count` places are free; what was read longest ago leaves."""
        lacking = self._places.missing(count)
        if lacking:
            self._demote(self._read_longest_ago(lacking))

    def _read_longest_ago(self, count: int) -> torch.Tensor:
        """[count] pages that are on the device."""
        last_read = self.last_read.masked_fill(self.place < 0, BEHIND)
        last_read[-1] = BEHIND
        return last_read.topk(count, largest=False).indices

    def _demote(self, pages: torch.Tensor) -> None:
        """Let pages [c] leave the device, those read longest ago first."""
        place, own = self.place[pages], pages.cpu()
        is_new = self.lower.disk_row[own] < 0
        if is_new.any():
            records = to_records(self.kv, place[is_new.to(place.device)]).cpu()
            self.lower.keep(own[is_new], records, self.last_read)
        self._places.release(place)
        self.place[pages] = -1

    def _reserve_places(self, missing, count, num_old):
        if missing:
            self.place, self.last_read = (
                widen(t, missing, 0) for t in (self.place, self.last_read)
            )
            self.place[-1 - missing : -1] = -1
            self.lower.add(missing)
            self._fit()

    def _fit(self) -> None:
        """Room on the device and below for the pages that there are."""
        num_pages = len(self.place) - 1
        self.lower.reserve(*self._plan.rows(num_pages, self.most_here(num_pages)))
        lacking = self._num_lacking(num_pages)
        if lacking:
            self._places.add(lacking)
            self.kv = widen_fields(self.kv, lacking)
        self.place[-1] = self.at_once

    def _num_lacking(self, num_pages: int) -> int:
        return max(0, self.most_here(num_pages) - self.at_once)

    def _places_growth_bytes(self, missing, count, num_old):
        lacking = self._num_lacking(self.null_page + missing)
        own = growth_bytes([self.place, self.last_read], len(self.place), missing)
        own += growth_bytes(self.kv.tensors, self.at_once + 1, lacking)
        return own + self._places.growth_bytes(lacking)

    def _narrow_places(self, kept):
        self.place, self.last_read = (narrow(t, kept, 0) for t in (self.place, self.last_read))
        self.lower.compact(kept)
        most = self.most_here(len(kept))
        self.lower.reserve(*self._plan.rows(len(kept), most))
        surplus = self.at_once - self._places.num_free - most
        if surplus > 0:
            self._demote(self._read_longest_ago(surplus))
        kept_places, number = self._places.compact()
        self.kv = narrow_fields(self.kv, kept_places)
        self.place = torch.where(self.place >= 0, number[self.place], -1)
        self._fit()
