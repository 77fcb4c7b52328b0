"""The shards of one layer that a rank owns: token buffers that are sealed into pages.

Legend: ng KV heads, hn head width, S tokens a page, L shards a rank, t tokens of a block.
A *group* is one (slot, local shard), with a token buffer; the last group takes padding.
"""

import torch
import torch.nn.functional as F

from pikv_megatron.cache.ledger import Admission, PageLedger
from pikv_megatron.cache.page_pool import PagePool
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.compression.base import KVCodec
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.types import AttentionState


class ShardStore:
    """Token buffers and pages of every sequence of the expert-parallel group, one layer.

    Args:
        placement: which shards this rank owns.
        num_slots: sequence slots of the whole group.
        max_pages: most pages that one sequence can have on this rank.
        page_size: S.
        num_groups: ng.
        head_dim: hn.
        has_replicas: whether tokens can be stored in more than one shard.
        codec: how sealed pages are stored.
    """

    def __init__(
        self, placement: Placement, num_slots: int, max_pages: int, page_size: int,
        num_groups: int, head_dim: int, has_replicas: bool, codec: KVCodec,
        dtype: torch.dtype, device: torch.device,
    ):
        self.placement = placement
        self.page_size = page_size
        self.num_slots = num_slots
        self._shards = placement.shards_per_rank
        self._codec = codec
        self.pool = PagePool(num_groups, page_size, head_dim, has_replicas, dtype, device)
        # The row behind the last slot is read by padding and never written.
        self.ledger = PageLedger(num_slots + 1, self._shards, page_size, device)
        groups = self.ledger.num_tokens.numel()
        shape = (num_groups, groups, page_size, head_dim)
        self.buffer_keys = torch.zeros(shape, dtype=dtype, device=device)
        self.buffer_values = torch.zeros(shape, dtype=dtype, device=device)
        self.buffer_position = torch.full(
            (groups, page_size), -1, dtype=torch.int32, device=device
        )
        self.buffer_earlier = (
            torch.zeros(groups, page_size, dtype=torch.int64, device=device)
            if has_replicas else None
        )
        self.page_table = torch.zeros(
            num_slots + 1, max_pages + 1, dtype=torch.int64, device=device
        )

    def reserve(self, num_pages: int) -> None:
        """See that `num_pages` pages are free before any token is computed."""
        self.pool.reserve(num_pages)

    def insert(self, block: TokenBlock) -> None:
        """Append tokens to their buffers, sealing every buffer that fills up: O(t)."""
        if block.slot.numel() == 0:
            return
        group = self._group(block)
        admission = self.ledger.admit(group)
        if admission.is_page.numel():
            self._seal(block, admission)
        self._fill_buffers(block, group, admission)

    def attend(
        self, query: torch.Tensor, slots: torch.Tensor, visited: torch.Tensor | None,
        softmax_scale: float,
    ) -> AttentionState:
        """Attention of query [n, sq, np, hn] over this rank's part of the sequences `slots` [n].

        Args:
            visited: [n] int64 bit masks of the visited shards, or None for all of them.
        """
        parts = [
            self._attend_pages(query, slots, visited, softmax_scale),
            self._attend_buffers(query, slots, visited, softmax_scale),
        ]
        return merge_states(
            torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts])
        )

    def release(self, slot: int) -> None:
        """Give back every page and buffer of a sequence."""
        self.pool.release(self._pages(slot))
        self.ledger.clear(slot)

    def tensors(self) -> list[torch.Tensor]:
        own = [
            self.buffer_keys, self.buffer_values, self.buffer_position, self.buffer_earlier,
            self.page_table,
        ]
        own = [t for t in own if t is not None]
        return own + self.ledger.tensors() + self.pool.tensors()

    def positions(self, slot: int) -> torch.Tensor:
        """Positions of the tokens stored for a sequence, in no order; replicas each count."""
        groups = range(slot * self._shards, (slot + 1) * self._shards)
        fills = [int(self.ledger.num_tokens[g]) % self.page_size for g in groups]
        open_parts = [self.buffer_position[g, :fill] for g, fill in zip(groups, fills)]
        return torch.cat([self.pool.position[self._pages(slot)].reshape(-1), *open_parts])

    def check_integrity(self) -> None:
        """Every page is free or in exactly one table, and the counts agree."""
        used = [self._pages(slot) for slot in range(self.num_slots)]
        every = torch.cat([*used, self.pool.free_pages()]).sort().values
        assert torch.equal(every, torch.arange(self.pool.num_pages, device=every.device)), (
            "pages lost or held twice"
        )
        full = self.ledger.num_tokens[:-1] // self.page_size
        assert torch.equal(full.view(self.num_slots + 1, -1).sum(1), self.ledger.num_pages), (
            "page counts disagree with token counts"
        )

    def holds(self, slot: int) -> bool:
        """Whether any token of a sequence is stored."""
        first = slot * self._shards
        return bool(self.ledger.num_tokens[first : first + self._shards].any())

    def _pages(self, slot: int) -> torch.Tensor:
        return self.page_table[slot, : int(self.ledger.num_pages[slot])]

    def _group(self, block: TokenBlock) -> torch.Tensor:
        mine = (block.slot >= 0) & (self.placement.owner(block.shard) == self.placement.rank)
        group = block.slot * self._shards + self.placement.local_shard(block.shard)
        return torch.where(mine, group, self.ledger.padding_group)

    def _seal(self, block: TokenBlock, admission: Admission) -> None:
        """Put together the pages that became full, encode them and list them."""
        self.pool.reserve(admission.is_page.numel())
        pages = self.pool.allocate(admission.is_page)
        column = torch.where(
            admission.is_page, admission.page_column, self.page_table.shape[1] - 1
        )
        self.page_table[admission.page_row, column] = pages
        group = admission.page_group
        shard = (group % self._shards) * self.placement.num_ranks + self.placement.rank
        self.pool.shard[pages] = shard.to(torch.int32)
        keys = _assemble(self.buffer_keys, block.keys, admission, dim=1)
        values = _assemble(self.buffer_values, block.values, admission, dim=1)
        self.pool.keys[:, pages], self.pool.values[:, pages] = self._codec.encode(keys, values)
        position = block.position.to(torch.int32)
        self.pool.position[pages] = _assemble(self.buffer_position, position, admission, dim=0)
        if self.buffer_earlier is not None:
            self.pool.earlier_shards[pages] = _assemble(
                self.buffer_earlier, block.earlier_shards, admission, dim=0
            )

    def _fill_buffers(self, block: TokenBlock, group: torch.Tensor, admission: Admission) -> None:
        group = torch.where(admission.page < 0, group, self.ledger.padding_group)
        self.buffer_keys[:, group, admission.offset] = block.keys
        self.buffer_values[:, group, admission.offset] = block.values
        self.buffer_position[group, admission.offset] = block.position.to(torch.int32)
        if self.buffer_earlier is not None:
            self.buffer_earlier[group, admission.offset] = block.earlier_shards

    def _attend_pages(self, query, slots, visited, softmax_scale) -> AttentionState:
        counts = self.ledger.num_pages[slots]
        width = int(counts.max()) if counts.numel() else 0
        table = self.page_table[slots, :width]
        is_page = torch.arange(width, device=slots.device) < counts.unsqueeze(1)
        table = torch.where(is_page, table, self.pool.num_pages)
        if visited is not None:
            is_page = is_page & _is_visited(visited.unsqueeze(1), self.pool.shard[table].long())
        mask = is_page.unsqueeze(2).expand(-1, -1, self.page_size)
        if self.buffer_earlier is not None:
            mask = mask & self._is_first_replica(self.pool.earlier_shards[table], visited)
        return self._codec.attend(
            query, self.pool.keys, self.pool.values, table, mask.reshape(slots.numel(), -1),
            softmax_scale,
        )

    def _attend_buffers(self, query, slots, visited, softmax_scale) -> AttentionState:
        local = torch.arange(self._shards, device=slots.device)
        table = slots.unsqueeze(1) * self._shards + local
        fill = self.ledger.num_tokens[table] % self.page_size
        mask = torch.arange(self.page_size, device=slots.device) < fill.unsqueeze(2)
        if visited is not None:
            shard = local * self.placement.num_ranks + self.placement.rank
            mask = mask & _is_visited(visited.unsqueeze(1), shard).unsqueeze(2)
        if self.buffer_earlier is not None:
            mask = mask & self._is_first_replica(self.buffer_earlier[table], visited)
        return decode_attention(
            query, self.buffer_keys, self.buffer_values, table, mask.reshape(slots.numel(), -1),
            softmax_scale,
        )

    @staticmethod
    def _is_first_replica(earlier: torch.Tensor, visited: torch.Tensor | None) -> torch.Tensor:
        """True where no visited shard holds a replica of lower order: earlier [n, m, S]."""
        return (earlier if visited is None else earlier & visited.view(-1, 1, 1)) == 0


def _assemble(
    buffers: torch.Tensor, tokens: torch.Tensor, admission: Admission, dim: int
) -> torch.Tensor:
    """Full pages of a block: what the buffers held, then the block's tokens.

    Groups lie along `dim` of the buffers, places behind it; tokens lie along `dim`.
    """
    pages = buffers.index_select(dim, F.pad(admission.page_group, (0, 1)))  # one more: lost writes
    page = torch.where(admission.page < 0, pages.shape[dim] - 1, admission.page)
    index = (slice(None),) * dim + (page, admission.offset)
    pages[index] = tokens
    return pages.narrow(dim, 0, pages.shape[dim] - 1)


def _is_visited(visited: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    return ((visited >> shard.clamp(min=0)) & 1).bool() & (shard >= 0)
