"""The shards of one layer that a rank owns: token buffers that are sealed into pages.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, hn head width, S tokens a page,
m columns of a sequence, k pages read, t tokens of a block. A *group* is one (slot, local shard),
with a token buffer.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from pikv_megatron.cache.owner.common_pages import CommonPages
from pikv_megatron.cache.owner.held_shares import HeldShares
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.page_keeper import PageKeeper
from pikv_megatron.cache.owner.page_masses import PageMasses
from pikv_megatron.cache.owner.pinned import Pinned
from pikv_megatron.cache.owner.store_lists import StoreLists
from pikv_megatron.cache.pages.aged_pool import AgedPagePool
from pikv_megatron.cache.pages.first_pages import fit_new
from pikv_megatron.cache.pages.ledger import Admission, PageLedger
from pikv_megatron.cache.pages.page_pool import PagePool
from pikv_megatron.cache.pages.page_table import PageTable
from pikv_megatron.cache.pages.token_buffer import TokenBuffers
from pikv_megatron.cache.partial_states import merge_rounds
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tiers.tiered_pool import TieredPagePool
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.codec.key_angles import KeyAngles
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.types import AttentionState, PageList

TABLE = "table", "lens"  # of a list: which pages, and how much of them


class ShardStore:
    """Token buffers and pages of every sequence of the expert-parallel group, one layer.

    Args:
        spec: the layer.
        placement: which shards this rank owns.
        page_size: S.
        num_slots: sequence slots of the whole group.
        max_pages: most pages that one sequence can fill on this rank.
        has_replicas: whether tokens can be stored in more than one shard.
        pinned: what is never dropped.
        num_positions: that tokens can have, where keys are stored before RoPE.
        others: pages of layers before, which may be had together with them.

    Attributes:
        common: the pages.
        keeper: of pages.
        on_read: told what queries read, as asked and as lists of pages and of token buffers; None:
            nobody asks.
        on_seal: told of the keys, values, page numbers and sequences of pages that were sealed;
            None: nobody asks.
        losses: by slot, `Loss` of sequences that were to read a page that is lost, since they were
            taken note of.
    """

    def __init__(
        self, spec: LayerSpec, placement: Placement, page_size: int, num_slots: int,
        max_pages: int, has_replicas: bool, pinned: Pinned = Pinned(), num_positions: int = 0,
        others: Iterable[CommonPages] = (),
    ):
        options, kv = spec.options, spec.kv
        self.placement = placement
        self.page_size = page_size
        self.num_slots = num_slots
        self._kv = kv
        retention = options.retention.build(spec.fitted)
        self._softmax_scale = spec.softmax_scale
        self._shards = placement.shards_per_rank
        self._codec = options.codec.build(
            kv, page_size, num_slots, spec.moments, placement.own_shards, num_positions
        )
        self._has_token_scores = options.retention.needs_scores
        num_scores = 0 if retention is None else retention.num_scores
        kind = PagePool if self._codec.older is None else AgedPagePool
        if options.retention.tiers is not None:
            kind = partial(TieredPagePool, options.retention.tiers)
        ageing = self._codec.ageing if retention is None else retention.ageing or self._codec.ageing
        pool = kind(
            self._codec, page_size, has_replicas, num_scores, ageing is not None, kv.device
        )
        masses = None
        if options.retention.needs_mass:
            masses = PageMasses(kv.num_groups, kv.device, options.retention.use_threshold)
        self.common = CommonPages.for_layer(pool, masses, others)
        self.pool, self.masses = self.common.pool, self.common.masses
        self.ledger = PageLedger(num_slots, self._shards, page_size, kv.device)
        metadata = {"position": torch.int32} | ({"earlier": torch.int64} if has_replicas else {})
        metadata |= {"score": torch.float32} if self._has_token_scores else {}
        self.buffers = TokenBuffers(self.ledger, kv.heads, metadata, kv.dtype, kv.device)
        self.table = PageTable(num_slots, max_pages, kv.device)
        self.held = None
        if self.masses is not None:
            self.held = HeldShares(self.masses, spec.num_heads, num_slots, kv.device)
        budget = options.budget.in_store(self.growth_bytes(1), num_slots, self._shards)
        if options.retention.tiers is not None:
            self.pool.most_here = partial(budget.of_rank, num_shards=num_slots * self._shards)
        self._lists = StoreLists(
            self.pool, self.table, self.buffers, placement, kv, spec.num_heads, self._codec.angles
        )
        self.keeper = PageKeeper(
            retention, budget, pinned, ageing, self._codec, placement, self.pool, self.table,
            self.ledger, self.masses, self.held, self._lists,
        )
        self.common.sharers.append(self)
        self.on_read: Callable[[OwnerReads, PageList, PageList], None] | None = None
        self.on_seal: Callable[[torch.Tensor, ...], None] | None = None
        self.losses: dict[int, int] = {}

    def reserve(self, num_pages: int, num_old: int = 0) -> None:
        """See that `num_pages` pages are free before any token is computed, `num_old` of them for
        what grows old."""
        self.common.reserve(num_pages, num_old)

    def compact(self) -> None:
        """Give back the memory of free pages; layers that share them do so at once."""
        if self.is_first:
            self.common.compact()

    def growth_bytes(self, num_pages: int, num_old: int = 0) -> int:
        """What `reserve` would allocate."""
        return self.common.growth_bytes(num_pages, num_old)

    @property
    def is_first(self) -> bool:
        """Of the layers that share pages, which are counted once."""
        return self.common.sharers[0] is self

    @property
    def stored_bytes(self) -> int:
        """Of its keys and values, as many as of each layer that it shares pages with."""
        return self.pool.stored_bytes // len(self.common.sharers)

    @property
    def angles(self) -> KeyAngles | None:
        """Of keys that are stored before RoPE; None: they are stored behind it."""
        return self._codec.angles

    def admit(self, block: TokenBlock, num_pages: int | None = None) -> Admission:
        """Number tokens, the same in every layer that places them alike; `num_pages` as of the
        ledger."""
        mine = (block.slot >= 0) & (self.placement.owner(block.shard) == self.placement.rank)
        group = block.slot * self._shards + self.placement.local_shard(block.shard)
        return self.ledger.admit(torch.where(mine, group, self.ledger.padding_group), num_pages)

    def insert(self, block: TokenBlock, admission: Admission) -> None:
        """Append tokens to their buffers, sealing every buffer that fills up: O(t)."""
        if block.slot.numel() == 0:
            return
        self._lists.clear()
        tokens = {name: getattr(block, name) for name in (*self._kv.heads, "position")}
        if self.pool.earlier_shards is not None:
            tokens["earlier"] = block.earlier_shards
        if self._has_token_scores:
            tokens["score"] = block.score
        pages = self.buffers.insert(admission, tokens)
        if pages:
            self._seal(admission, pages)

    def attend(
        self, query: torch.Tensor, reads: OwnerReads, near: list[PageList]
    ) -> AttentionState:
        """Attention of query [n, sq, np, hn] over this rank's part of n sequences.

        Args:
            reads: which sequences, and which part of them.
            near: lists that are attended to besides, in the same softmax.
        """
        sealed, opened = self._read(reads)
        return self._attend(query, reads, sealed, [opened, *near])[0]

    def attend_decoding(
        self, query: torch.Tensor, reads: OwnerReads, near: list[PageList],
        last_lse: torch.Tensor | None, by_shard: bool,
    ) -> tuple[AttentionState, torch.Tensor | None]:
        """The same for a decode step's query [n, 1, np, hn], whose masses are held until the next
        where they are counted.

        Args:
            last_lse: [n, np], of the sequences' last attention that this rank had a part in; None:
                its part is always the whole.
            by_shard: whether to return shares.

        Returns:
            The attention; and the share of it that each shard of this rank has, [n, 1, np, s].
        """
        found = self._attend_decoding(query, reads, near, last_lse, by_shard)
        if reads.ahead is not None:
            columns = self.keeper.num_columns(reads.num_columns)
            self.pool.fetch_ahead(self._lists.ahead(reads, columns))
        return found

    def page_logits(self, query: torch.Tensor, reads: OwnerReads) -> torch.Tensor:
        """What query [n, np, hn] would find in every page of n sequences here, from its stored
        keys: [n, np, m], see `PageCodec.page_logits`."""
        sealed = self._lists.sealed(reads, self.keeper.num_columns(reads.num_columns))
        lists, parts = self.pool.lists(sealed), None
        if self._codec.num_bases > 1:
            parts = [self._part(sealed.table)] * len(lists)
        return self._codec.page_logits(query, lists, self._softmax_scale, reads.slots, parts)

    def observe(self, query: torch.Tensor, lse: torch.Tensor, reads: OwnerReads) -> None:
        """Count the masses of a prompt's last queries.

        Args:
            query: [1, sq, np, hn].
            lse: [1, sq, np], of their whole attention.
            reads: the sequence, with at least the pages that it has before the next `prune`, and
                the position of its last query.
        """
        sealed = self._lists.sealed(reads, reads.num_columns)
        state, mass, _ = self._attend(query, reads, sealed, [], with_mass=True)
        shares = mass * (state.lse - lse).exp().unsqueeze(3)
        pages = torch.where(sealed.lens > 0, sealed.table, -1)
        age = torch.arange(query.shape[1] - 1, -1, -1, device=query.device)
        self.masses.observe(pages, shares, reads.positions.unsqueeze(1) - age)

    def release(self, slot: int) -> None:
        """Give back every page and buffer of a sequence."""
        self._lists.clear()
        self.pool.release(self.table.pages_of(slot))
        self.table.clear(slot)
        self.ledger.clear(slot)
        self.losses.pop(slot, None)
        # The next sequence reads around what is left there: it must be finite.
        name = "keys" if self._kv.values_in_keys else "values"
        self.buffers.tensors[name][:, slot * self._shards : (slot + 1) * self._shards] = 0.0
        for part in range(self._codec.num_bases):
            self._codec.forget(slot * self._codec.num_bases + part)
        if self.held is not None:
            self.held.release(slot)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """All tensors, by what they are for."""
        masses = [] if self.masses is None else self.masses.tensors()
        held = [] if self.held is None else self.held.tensors()
        own = self.table.tensors() + self.ledger.tensors()
        return {
            "pages": self.pool.payload() if self.is_first else [],
            "codecs": self._codec.tensors(),
            "buffers": list(self.buffers.tensors.values()),
            "tables": own + (self.pool.metadata() if self.is_first else []),
            "statistics": held + (masses if self.is_first else []),
        }

    def positions(self, slot: int) -> torch.Tensor:
        """Positions of the tokens stored for a sequence, in no order; replicas each count."""
        groups = torch.arange(slot * self._shards, (slot + 1) * self._shards)
        position = self.buffers.tensors["position"]
        lens = self.buffers.lens(groups).tolist()
        open_parts = [position[g, :length] for g, length in zip(groups.tolist(), lens)]
        sealed = self.pool.position[self.table.pages_of(slot)].reshape(-1)
        return torch.cat([sealed, *open_parts])

    def restore(
        self, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [ng, c, S, w] that pages [c] of the sequences `slots` [c] stand for."""
        return self.pool.restore(self._codec, pages, self._parts(pages, slots))

    def check_integrity(self) -> None:
        """Every page is free or in exactly one table, and the counts agree."""
        self.common.check_integrity()
        full = self.ledger.num_tokens[:-1] // self.page_size
        filled = full.view(self.num_slots, -1).sum(1)
        assert torch.equal(filled, self.ledger.num_pages), "page counts disagree with token counts"
        kept = self.table.count
        assert bool((kept <= filled).all()), "more pages listed than were filled"
        assert self.keeper.drops or torch.equal(kept, filled), "pages are missing"

    def forget_lists(self) -> None:
        """Pages may lie elsewhere than before."""
        self._lists.clear()

    def renumber(self, number: torch.Tensor) -> None:
        """Every page has a new number, [old pages + 1]."""
        self.table.renumber(number)
        if self.held is not None:
            self.held.renumber(number)

    def used_pages(self) -> torch.Tensor:
        """Numbers of the pages of all sequences."""
        return torch.cat([self.table.pages_of(slot) for slot in range(self.num_slots)])

    def holds(self, slot: int) -> bool:
        """Whether any token of a sequence is stored."""
        first = slot * self._shards
        return bool(self.ledger.num_tokens[first : first + self._shards].any())

    def _attend_decoding(self, query, reads, near, last_lse, by_shard):
        if self.held is None and not by_shard:
            return self.attend(query, reads, near), None
        sealed, opened = self._read(reads)
        state, mass, (of_open, *_) = self._attend(query, reads, sealed, [opened, *near], True)
        if self.held is not None:
            pages = torch.where(sealed.lens > 0, sealed.table, -1)
            self._count(reads, pages, mass[:, 0], state.lse[:, 0], last_lse)
        if not by_shard:
            return state, None
        shard = self.placement.local_shard(self.pool.shard[sealed.table].long())
        return state, of_open.scatter_add(3, shard[:, None, None].expand_as(mass), mass)

    def _attend(
        self, query: torch.Tensor, reads: OwnerReads, sealed: PageList, plain: list[PageList],
        with_mass: bool = False,
    ) -> tuple[AttentionState, torch.Tensor | None, list[torch.Tensor]]:
        """The attention, and if asked for the masses of the sealed pages and of the other lists;
        nobody asks where pages are drawn."""
        every, rounds = [sealed, *self._drawn(reads)], []
        for lists in self._rounds(reads, every):
            each_is, parts = len(lists) // len(every), None
            if self._codec.num_bases > 1:
                parts = [self._part(each.table) for each in every for _ in range(each_is)]
            rounds.append(self._codec.attend(
                query, lists, plain, self._softmax_scale, reads.slots, with_mass, parts
            ))
            plain = []  # read by the first
        self._note_losses(reads, every)
        state, masses = merge_rounds(rounds)
        if masses is None:
            return state, None, []
        # A page is read through one of the lists, and has no mass in the others.
        return state, sum(masses[1:each_is], masses[0]), masses[each_is:]

    def _rounds(self, reads: OwnerReads, every: list[PageList]) -> Iterator[list[PageList]]:
        """Lists of pages, those of the sealed ones first, as they are stored."""
        if self.pool.at_once is not None:
            yield from self.pool.rounds(every)
        else:
            sealed, *drawn = every
            further = (part for each in drawn for part in self.pool.lists(each))
            yield [*self._lists.stored(reads, sealed), *further]

    def _note_losses(self, reads: OwnerReads, every: list[PageList]) -> None:
        losses = self.pool.losses(every)
        if losses is not None:
            found = zip(reads.slots.tolist(), losses.tolist())
            self.losses |= {slot: loss for slot, loss in found if loss}

    def _part(self, pages: torch.Tensor) -> torch.Tensor:
        """Which part of its sequence each page [...] belongs to: its shard."""
        return self.placement.local_shard(self.pool.shard[pages].long())

    def _parts(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The slots of the parts of sequences that pages [c] of the sequences `slots` [c] are of.
        """
        count = self._codec.num_bases
        return slots if count == 1 else slots * count + self._part(pages)

    def _seal(self, admission: Admission, full: dict[str, torch.Tensor]) -> None:
        """Store the pages that became full, and list them."""
        self.reserve(admission.is_page.numel())
        pages = self.pool.allocate(admission.is_page)
        self.table.append(admission.page_row, admission.page_order, pages, admission.is_page)
        local = admission.page_group % self._shards
        shard = local * self.placement.num_ranks + self.placement.rank
        self.pool.shard[pages] = shard.to(torch.int32)
        self.pool.position[pages] = full["position"]
        if self.pool.earlier_shards is not None:
            self.pool.earlier_shards[pages] = full["earlier"]
        if self.pool.level is not None:
            self.pool.level[pages] = 0
        if self.masses is not None:
            self.masses.start(pages)
        slots, keys = self._parts(pages, admission.page_row), full["keys"]
        values = self._kv.values_of(keys, full.get("values"))
        if self._has_token_scores:
            self.pool.score[pages] = full["score"].mean(dim=1, keepdim=True)
        elif self.pool.score is not None:
            policy = self.keeper.retention
            self.pool.score[pages] = policy.score_pages(keys, values, full["position"])
        if self._codec.learns:
            fit_new(self._codec, slots, admission.is_page, keys, values)
        step = self.pool.at_once or max(1, len(pages))
        for first in range(0, len(pages), step):
            part = slice(first, first + step)
            self._codec.seal(
                keys[:, part], values[:, part], self.pool.kv, self.pool.places(pages[part]),
                slots[part], position=full["position"][part],
            )
        if self.on_seal is not None:
            real = admission.is_page.nonzero().squeeze(1)
            row = admission.page_row[real]
            self.on_seal(keys[:, real], values[:, real], pages[real], row)

    def _count(
        self, reads: OwnerReads, pages: torch.Tensor, shares: torch.Tensor, lse: torch.Tensor,
        last_lse: torch.Tensor | None,
    ) -> None:
        """Count the last step's shares and hold those of this one; see `attend_decoding`."""
        if last_lse is None:
            self.held.credit_whole()
            self.held.hold_whole(pages, shares, reads.positions)
        else:
            self.held.credit(reads.slots, last_lse)
            self.held.hold(reads.slots, pages, shares, lse, reads.positions)

    def _read(self, reads: OwnerReads) -> tuple[PageList, PageList]:
        """Pages and token buffers that are read."""
        sealed = self._lists.sealed(reads, self.keeper.num_columns(reads.num_columns))
        opened = self._lists.opened(reads)
        if self.on_read is not None:
            every = [sealed, *self._drawn(reads)]
            table, lens = (torch.cat([getattr(x, name) for x in every], 1) for name in TABLE)
            self.on_read(reads, sealed._replace(table=table, lens=lens), opened)
        return sealed, opened

    def _drawn(self, reads: OwnerReads) -> list[PageList]:
        return self._lists.drawn(reads, self.keeper.num_columns(reads.num_columns))
