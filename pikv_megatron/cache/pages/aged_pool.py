"""Pages of two widths: newer ones, and older ones in fewer bits.

Legend: p pages, c some of them, r sequences, m columns, n queries' sequences.
"""

import torch

from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.cache.pages.widen import growth_bytes, narrow, narrow_fields, widen, widen_fields
from pikv_megatron.types import KVPages


class AgedPagePool(PagePool):
    """A page that grows old keeps its number, and what is known of it, and moves to another place.

    Attributes:
        old: what older pages store, the null page last.
        place: [p + 1], int64, where a page lies in `kv`; of an older one, ~place in `old`.

    Example:
        Places 2, ~0, 0: page 1 is the first of the older ones, pages 0 and 2 are new.
    """

    def __init__(self, codec, page_size, has_replicas, num_scores, has_levels, device):
        super().__init__(codec, page_size, has_replicas, num_scores, has_levels, device)
        self._codec = codec
        self.old: KVPages = codec.allocate_old(1)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self._new_places, self._old_places = FreeList(device), FreeList(device)

    @property
    def sizes(self):
        return self.null_page, self._new_places.num_pages, self._old_places.num_pages

    def allocate(self, is_page):
        pages = super().allocate(is_page)
        self.place[pages] = self._new_places.allocate(is_page)
        return pages

    def places(self, pages):
        return self.place[pages]

    def release(self, pages):
        super().release(pages)
        place = self.place[pages]
        self._new_places.release(place[place >= 0])
        self._old_places.release(~place[place < 0])

    def release_some(self, pages, is_released):
        super().release_some(pages, is_released)
        place = self.place[pages]
        self._new_places.release_some(place, is_released & (place >= 0))
        self._old_places.release_some(~place, is_released & (place < 0))

    def lists(self, sealed):
        place = self.place[sealed.table]
        is_old = place < 0
        return [
            sealed._replace(
                pages=pages, table=own.clamp(min=0), lens=sealed.lens.masked_fill(is_hidden, 0)
            )
            for pages, own, is_hidden in (
                (self.old, ~place, ~is_old), (self.kv, place, is_old),
            )
        ]

    def restore(self, codec, pages, slots):
        place = self.place[pages]
        older, newer = (
            codec.restore(part, own.clamp(min=0), slots, self.position[pages])
            for part, own in ((self.old, ~place), (self.kv, place))
        )
        is_old = (place < 0).view(-1, 1, 1)
        return tuple(torch.where(is_old, *pair) for pair in zip(older, newer))

    def grow_old(self, pages: torch.Tensor) -> None:
        """Store new pages [c] as older ones are, and use their places again."""
        count = pages.numel()
        self._reserve_old(count)
        place = self.place[pages]
        older = self._old_places.allocate(torch.ones_like(place, dtype=torch.bool))
        self._codec.reseal(self.kv, place, self.old, older)
        self._new_places.release(place)
        self.place[pages] = ~older

    def metadata(self):
        places = [self.place, *self._new_places.tensors(), *self._old_places.tensors()]
        return super().metadata() + places

    def payload(self):
        return self.kv.tensors + self.old.tensors

    def check_integrity(self) -> None:
        """Every place is free or has exactly one page."""
        is_used = torch.ones(self.null_page, dtype=torch.bool, device=self.place.device)
        is_used[self.free.pages()] = False
        place = self.place[:-1][is_used]
        for free, used in (
            (self._new_places, place[place >= 0]), (self._old_places, ~place[place < 0]),
        ):
            every = torch.cat([used, free.pages()]).sort().values
            assert torch.equal(every, torch.arange(free.num_pages, device=every.device)), (
                "places lost or held twice"
            )

    def _reserve_places(self, missing, count, num_old):
        if missing:
            self.place = widen(self.place, missing, 0)
        lacking = self._new_places.missing(count - num_old)
        if lacking:
            self._new_places.add(lacking)
            self.kv = widen_fields(self.kv, lacking)
        self._reserve_old(num_old)

    def _reserve_old(self, count: int) -> None:
        lacking = self._old_places.missing(count)
        if lacking:
            self._old_places.add(lacking)
            self.old = widen_fields(self.old, lacking)

    def _places_growth_bytes(self, missing, count, num_old):
        own = missing * self.place.element_size()
        for kv, free, wanted in (
            (self.kv, self._new_places, count - num_old), (self.old, self._old_places, num_old),
        ):
            lacking = free.missing(wanted)
            own += growth_bytes(kv.tensors, free.num_pages + 1, lacking)
            own += free.growth_bytes(lacking)
        return own

    def _narrow_places(self, kept):
        place = narrow(self.place, kept, 0)
        kept_new, new = self._new_places.compact()
        kept_old, old = self._old_places.compact()
        self.kv, self.old = narrow_fields(self.kv, kept_new), narrow_fields(self.old, kept_old)
        is_old = place < 0
        self.place = torch.where(
            is_old, ~old[(~place).clamp(min=0)], new[place.clamp(min=0)]
        )
        self.place[-1] = 0
