"""Sealed pages: a transform, then a format; written, read and attended to in one place.

Legend: ng KV heads, c pages, S tokens a page, hn head width, n sequences, sq query tokens, np query
heads, m pages listed for a sequence.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from pikv_megatron.codec.format.base import FormatOptions
from pikv_megatron.codec.key_angles import KeyAngles
from pikv_megatron.codec.transform.base import KVTransform
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.expand_pages import expand_pages
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.ops.seal_page import seal_page
from pikv_megatron.types import Ageing, AttentionState, KVPages, KVShape, PageList, SharedRow

LEAST_MASS = torch.finfo(torch.float32).tiny  # whose logarithm there is


class PageCodec:
    """Token buffers and stream windows stay as computed.

    Args:
        kv: tokens as computed.
        page_size: S.
        transform: None stores them in their own widths.
        page_format: how numbers are packed.
        ageing: how older pages are pooled; None: they are not.
        num_bases: parts of a sequence whose pages are stored in their own ways.
        angles: of keys that are stored before RoPE; None: behind it.

    Attributes:
        pooled: neighbours that are stored as one token when they are sealed.
        ageing: as given.
        older: how older pages are packed; None: as they were.
        angles: as given.
        num_bases: as given; `slots` of pages are those of their parts, slot * num_bases + part.
    """

    def __init__(
        self, kv: KVShape, page_size: int, transform: KVTransform | None,
        page_format: FormatOptions, ageing: Ageing | None = None, num_bases: int = 1,
        angles: KeyAngles | None = None,
    ):
        self._transform = transform
        self._format = page_format
        self.num_bases, self.angles = num_bases, angles
        self.ageing, self.older = ageing, page_format.older
        self._stored, self.pooled = kv, 1 if transform is None else transform.pooled
        if transform is not None:
            self._stored = kv._replace(
                key_width=transform.key_width, value_width=transform.value_width
            )
        self._page_size = page_size // self.pooled  # as stored

    def allocate(self, num_pages: int) -> KVPages:
        """An empty pool of `num_pages` pages."""
        return self._allocate(self._format, num_pages)

    def allocate_old(self, num_pages: int) -> KVPages:
        """The same for older pages."""
        return self._allocate(self.older.format, num_pages)

    def _allocate(self, page_format: FormatOptions, num_pages: int) -> KVPages:
        pages = page_format.allocate(self._stored, num_pages, self._page_size)
        if self.pooled > 1 or self.ageing is not None:
            logs = torch.zeros(num_pages, device=self._stored.device)
            pages = pages._replace(log_multiplicity=logs)
        return pages

    def seal(
        self, keys: torch.Tensor, values: torch.Tensor, pages: KVPages, page: torch.Tensor,
        slots: torch.Tensor, level: int = 0, position: torch.Tensor | None = None,
    ) -> None:
        """Write full pages [ng, c, S, hn] of the sequences `slots` [c] to the places page [c].

        Args:
            level: times that their tokens were pooled before.
            position: of the tokens, [c, S], where keys are stored before RoPE.
        """
        if self.angles is not None:
            keys = self.angles.before(keys, position)
        if self._transform is not None:
            keys, values = self._transform.encode(keys, values, slots)
        seal_page(keys, None if pages.values is None else values, pages, page)
        if pages.log_multiplicity is not None:
            pages.log_multiplicity[page] = math.log(self.pooled << level)

    def reseal(
        self, pages: KVPages, page: torch.Tensor, old: KVPages, old_page: torch.Tensor
    ) -> None:
        """Write the pages `page` [c] of a pool to the places old_page [c] of one of older pages."""
        keys, values = expand_pages(pages, page)
        seal_page(keys, None if old.values is None else values, old, old_page)
        if old.log_multiplicity is not None:
            old.log_multiplicity[old_page] = pages.log_multiplicity[page]

    def restore(
        self, pages: KVPages, page: torch.Tensor, slots: torch.Tensor,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [ng, c, S, hn] that stored pages stand for; `position` as `seal`."""
        keys, values = expand_pages(pages, page)
        if self.angles is not None:
            keys = self.angles.after(keys, position)
        if self._transform is None:
            return keys, values
        return self._transform.decode(keys, values, slots)

    def attend(
        self, query: torch.Tensor, sealed: list[PageList], plain: list[PageList],
        softmax_scale: float, slots: torch.Tensor, with_mass: bool = False,
        parts: Sequence[torch.Tensor] | None = None,
    ) -> tuple[AttentionState, list[torch.Tensor] | None]:
        """Attention of query [n, sq, np, hn] over lists of sealed pages and lists as computed.

        Args:
            slots: [n], of the sequences.
            parts: of every listed page, [n, m] for each of the sealed lists, where sequences have
                several.

        Returns:
            The attention; and the shares of it that the pages of each list have, sealed ones first,
            [n, sq, np, m], if asked.
        """
        if self._transform is None:
            return decode_attention(query, [*sealed, *plain], softmax_scale, with_mass)
        attend = self._attend_transformed
        if self.num_bases > 1:
            attend = partial(self._attend_by_part, parts)
        far, masses = attend(query, sealed, softmax_scale, slots, with_mass)
        if not plain:
            return far, masses
        near, others = decode_attention(query, plain, softmax_scale, with_mass)
        state = merge_states(*(torch.stack(parts) for parts in zip(far, near)))
        if not with_mass:
            return state, None
        by_part = ((far.lse, masses), (near.lse, others))
        return state, [
            mass * (lse - state.lse).exp().unsqueeze(3) for lse, part in by_part for mass in part
        ]

    def page_logits(
        self, query: torch.Tensor, sealed: list[PageList], softmax_scale: float,
        slots: torch.Tensor, parts: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What query [n, np, hn] would find in sealed pages, from their keys alone.

        Args:
            sealed: lists of as many columns, of which one reads a page.
            parts: see `attend`.

        Returns:
            [n, np, m], float32, the log of each page's summed exponentials, -inf where none is
            listed. A page that has less than 1e-38 of the whole's is said to have that.
        """
        n, query = len(slots), query.unsqueeze(1)
        if self.num_bases > 1:
            query, sealed, slots = self._parted(query, sealed, slots, parts)
        query, lists = self._absorbed(query, sealed, softmax_scale, slots)
        # The attention is over the first channel of the keys, and is not looked at.
        lists = [
            each._replace(pages=each.pages._replace(
                values=None, value_scale=None, value_zero=None,
                shared=SharedRow(each.pages.page_size, 1),
            ))
            for each in lists
        ]
        state, masses = decode_attention(query, lists, softmax_scale, with_mass=True)
        mass = sum(masses[1:], masses[0])
        logit = mass.clamp(min=LEAST_MASS).log() + state.lse.unsqueeze(3)
        is_none = sum(each.lens for each in sealed) == 0
        logit = logit.squeeze(1).masked_fill_(is_none.unsqueeze(1), -torch.inf)
        if self.num_bases == 1:
            return logit
        # A page is of one part of its sequence.
        return logit.unflatten(0, (n, self.num_bases)).amax(dim=1)

    @property
    def learns(self) -> bool:
        """Whether it has to be fitted."""
        return self._transform is not None and self._transform.learns

    def fit(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Learn from the tokens [ng, t, hn] of a sequence's first pages."""
        self._transform.fit(slot, keys, values)

    def is_fitted(self, slot: int) -> bool:
        """Whether `fit` has nothing to do for a sequence."""
        return self._transform.is_fitted(slot)

    def forget(self, slot: int) -> None:
        """The sequence ended."""
        if self._transform is not None:
            self._transform.forget(slot)

    def tensors(self) -> list[torch.Tensor]:
        """What is kept besides the pages."""
        own = [] if self.angles is None else [self.angles.table]
        return own if self._transform is None else own + self._transform.tensors()

    def _parted(
        self, query: torch.Tensor, sealed: list[PageList], slots: torch.Tensor,
        parts: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, list[PageList], torch.Tensor]:
        """Queries, lists and slots of the parts of n sequences, each a sequence of its own."""
        count, every = self.num_bases, torch.arange(self.num_bases, device=slots.device)

        def by_part(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.repeat_interleave(count, 0)

        lists = [
            each._replace(
                table=by_part(each.table), token_mask=by_part(each.token_mask),
                lens=by_part(each.lens) * (by_part(part) == every.repeat(len(slots)).unsqueeze(1)),
                logit_bias=by_part(each.logit_bias),
                turn=each.turn and each.turn._replace(rows=by_part(each.turn.rows)),
            )
            for each, part in zip(sealed, parts)
        ]
        return by_part(query), lists, (slots.unsqueeze(1) * count + every).flatten()

    def _attend_by_part(self, parts, query, sealed, softmax_scale, slots, with_mass):
        """Every part of a sequence is attended to by itself, and all are merged."""
        n, count = len(slots), self.num_bases
        query, lists, slots = self._parted(query, sealed, slots, parts)
        states, masses = self._attend_transformed(query, lists, softmax_scale, slots, with_mass)
        states = AttentionState(*(x.unflatten(0, (n, count)) for x in states))
        state = AttentionState(*merge_states(*(x.transpose(0, 1).contiguous() for x in states)))
        if masses is None:
            return state, None
        share = (states.lse - state.lse.unsqueeze(1)).exp()
        share = share.masked_fill(states.lse == -torch.inf, 0.0).unsqueeze(4)
        return state, [(mass.unflatten(0, (n, count)) * share).sum(1) for mass in masses]

    def _attend_transformed(self, query, sealed, softmax_scale, slots, with_mass):
        absorbed, lists = self._absorbed(query, sealed, softmax_scale, slots)
        state, masses = decode_attention(absorbed, lists, softmax_scale, with_mass)
        out = self._transform.emit(state.out, slots)
        has_keys = (state.lse > -torch.inf).unsqueeze(3)
        return AttentionState(out * has_keys, state.lse), masses

    def _absorbed(
        self, query: torch.Tensor, sealed: list[PageList], softmax_scale: float,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, list[PageList]]:
        """A query [n, sq, np, hn] as it meets what is stored, and lists as they are stored."""
        if self._transform is None:
            return query, sealed
        absorbed, bias = self._transform.absorb(query, slots)
        lists = [self._stored_list(each) for each in sealed]
        if bias is not None:
            bias = bias * softmax_scale
            lists = [
                each._replace(
                    logit_bias=bias if each.logit_bias is None else bias + each.logit_bias
                )
                for each in lists
            ]
        return absorbed.to(query.dtype), lists

    def _stored_list(self, sealed: PageList) -> PageList:
        """A list of whole pages, with as many tokens as are stored of them."""
        if self.pooled == 1:
            return sealed
        assert sealed.token_mask is None, "pooled tokens are hidden together only"
        return sealed._replace(lens=sealed.lens // self.pooled)
