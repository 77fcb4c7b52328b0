"""Sealed pages of one layer on their owner rank."""

from collections.abc import Callable, Sequence

import torch

from pikv_megatron.cache.pages.free_list import FreeList
from pikv_megatron.cache.pages.widen import growth_bytes, narrow, narrow_fields, widen, widen_fields
from pikv_megatron.codec.codec import PageCodec
from pikv_megatron.types import KVPages, PageList, Recalled

# What is known of every page besides what it stores.
BOOKS = ("position", "shard", "earlier_shards", "score", "level")


class PagePool:
    """Pages of S tokens; one more, the null page, takes writes that are to be lost.

    Attributes:
        kv: what the codec stores, the null page last.
        position: [p + 1, S], int32.
        shard: [p + 1], int32, the shard a page belongs to.
        earlier_shards: [p + 1, S], int64 replica masks, or None without replicas.
        score: [p + 1, scores], float32, of a page, or None where retention does not ask for it.
        level: [p + 1], int32, how often a page took part as pages became fewer; None: they never
            do.
        free: which pages are free.
    """

    def __init__(
        self, codec: PageCodec, page_size: int, has_replicas: bool, num_scores: int,
        has_levels: bool, device: torch.device,
    ):
        self.free = FreeList(device)
        self.kv: KVPages = codec.allocate(1)
        self.position = torch.full((1, page_size), -1, dtype=torch.int32, device=device)
        self.shard = torch.zeros(1, dtype=torch.int32, device=device)
        self.earlier_shards = (
            torch.zeros(1, page_size, dtype=torch.int64, device=device) if has_replicas else None
        )
        self.score = torch.zeros(1, num_scores, device=device) if num_scores else None
        self.level = None
        if has_levels:
            self.level = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def null_page(self) -> int:
        return self.free.num_pages

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pages that there is room for."""
        return (self.null_page,)

    @property
    def at_once(self) -> int | None:
        """Pages that can be sealed, or read, at once; None: any number."""
        return None

    def is_like(self, other: "PagePool") -> bool:
        """Whether pages of either could lie in the other."""
        return type(self) is type(other) is PagePool and self._page_layout() == other._page_layout()

    def allocate(self, is_page: torch.Tensor) -> torch.Tensor:
        """A page for every True of [c]; the others get the null page. As many are surely free."""
        return self.free.allocate(is_page)

    def places(self, pages: torch.Tensor) -> torch.Tensor:
        """Where in `kv` pages [...] that are to be sealed lie."""
        return pages

    def release(self, pages: torch.Tensor) -> None:
        """Take pages [c] back."""
        self.free.release(pages)

    def release_some(self, pages: torch.Tensor, is_released: torch.Tensor) -> None:
        """Take back the pages [c] for which is_released [c] is True."""
        self.free.release_some(pages, is_released)

    def lists(self, sealed: PageList) -> list[PageList]:
        """What is attended to, where pages are listed by their numbers: lists of as many columns,
        of which one reads a page."""
        return [sealed]

    def losses(self, lists: Sequence[PageList]) -> torch.Tensor | None:
        """[n], int64, `Loss` of a page, by its number in any of the lists, that each sequence was
        to read; None: all are there."""
        return None

    @property
    def lower_bytes(self) -> tuple[int, int]:
        """What is kept in the host's memory and in a file, besides what is where pages are read."""
        return 0, 0

    def take_recalled(self) -> Recalled:
        """What came back to the device since it was last asked."""
        return Recalled()

    def hold_space(self) -> None:
        """Take what space there must be for pages that leave memory.

        Raises:
            OSError: there is too little.
        """

    def restore(
        self, codec: PageCodec, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [ng, c, S, hn] that pages [c] of the sequences `slots` stand for."""
        return codec.restore(self.kv, pages, slots, self.position[pages])

    def reserve(self, count: int, num_old: int = 0) -> int:
        """See that `count` pages are free, `num_old` of them for what grows old; how many the pool
        grew by."""
        missing = self.free.missing(count)
        self._reserve_places(missing, count, num_old)
        if not missing:
            return 0
        self.free.add(missing)
        self._resize(lambda book: widen(book, missing, 0))
        return missing

    def compact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give back the memory of free pages; see `FreeList.compact` for what is returned."""
        kept, number = self.free.compact()
        self._narrow_places(kept)
        self._resize(lambda book: narrow(book, kept, 0))
        return kept, number

    def growth_bytes(self, count: int, num_old: int = 0) -> int:
        """What `reserve` would allocate."""
        missing = self.free.missing(count)
        own = growth_bytes(self._described(), self.null_page + 1, missing)
        own += self._places_growth_bytes(missing, count, num_old)
        return own + self.free.growth_bytes(missing)

    def check_integrity(self) -> None:
        """Nothing is held besides what pages are."""

    def metadata(self) -> list[torch.Tensor]:
        """What is kept of pages besides what they store."""
        return [t for t in self._described() if t is not None] + self.free.tensors()

    def payload(self) -> list[torch.Tensor]:
        """Their keys and values as stored."""
        return self.kv.tensors

    @property
    def stored_bytes(self) -> int:
        """Of the keys and values of all pages, wherever they lie."""
        return sum(t.nbytes for t in self.payload())

    def tensors(self) -> list[torch.Tensor]:
        return self.payload() + self.metadata()

    def _reserve_places(self, missing: int, count: int, num_old: int) -> None:
        """As `reserve`, of places in `kv`; the pool lacks `missing` numbers."""
        if missing:
            self.kv = widen_fields(self.kv, missing)

    def _places_growth_bytes(self, missing: int, count: int, num_old: int) -> int:
        return growth_bytes(self.kv.tensors, self.null_page + 1, missing)

    def _narrow_places(self, kept: torch.Tensor) -> None:
        """Keep the places of the pages `kept` [k]."""
        self.kv = narrow_fields(self.kv, kept)

    def _page_layout(self) -> list[tuple]:
        """Of a page, field by field."""
        books = [None if book is None else book[0] for book in self._described()]
        fields = [
            field.select(min(1, field.dim() - 1), 0) if isinstance(field, torch.Tensor) else field
            for field in self.kv
        ]
        return [
            (part.shape, part.dtype) if isinstance(part, torch.Tensor) else part
            for part in books + fields
        ]

    def _described(self) -> list[torch.Tensor | None]:
        return [getattr(self, name) for name in BOOKS]

    def _resize(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put changed books in the place of those that there are."""
        for name, book in zip(BOOKS, self._described()):
            if book is not None:
                setattr(self, name, change(book))
