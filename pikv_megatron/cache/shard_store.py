"""The shards of one layer that a rank owns: token buffers that are sealed into pages.

Legend: ng KV heads, hn head width, S tokens a page, L shards a rank, t tokens of a block.
A *group* is one (slot, local shard); the last group and the last slot take padding.
"""

import torch

from pikv_megatron.cache.page_pool import PagePool
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.merge_states import merge_states
from pikv_megatron.cache.placement import Placement
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
    """

    def __init__(
        self, placement: Placement, num_slots: int, max_pages: int, page_size: int,
        num_groups: int, head_dim: int, has_replicas: bool,
        dtype: torch.dtype, device: torch.device,
    ):
        self.placement = placement
        self.page_size = page_size
        self.num_slots = num_slots
        self._shards = placement.shards_per_rank
        groups = num_slots * self._shards + 1
        self.pool = PagePool(num_groups, page_size, head_dim, has_replicas, dtype, device)
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
        self.num_tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        self.page_table = torch.zeros(
            num_slots + 1, max_pages + 1, dtype=torch.int64, device=device
        )
        self.num_pages = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def reserve(self, num_pages: int) -> None:
        """See that `num_pages` pages are free before any token is computed."""
        self.pool.reserve(num_pages)

    def insert(self, block: TokenBlock) -> None:
        """Append tokens to their buffers, sealing every buffer that fills up: O(t)."""
        if block.slot.numel() == 0:
            return
        group = self._group(block)
        index, before, after = self._number(group)
        pages, first = self._seal(before, after, group.numel())
        self._write(block, group, index, before, after, pages, first)

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
        count = int(self.num_pages[slot])
        self.pool.release(self.page_table[slot, :count])
        self.num_pages[slot] = 0
        self.num_tokens[slot * self._shards : (slot + 1) * self._shards] = 0

    def tensors(self) -> list[torch.Tensor]:
        own = [
            self.buffer_keys, self.buffer_values, self.buffer_position, self.buffer_earlier,
            self.num_tokens, self.page_table, self.num_pages,
        ]
        return [t for t in own if t is not None] + self.pool.tensors()

    def positions(self, slot: int) -> torch.Tensor:
        """Positions of the tokens stored for a sequence, in no order; replicas each count."""
        pages = self.page_table[slot, : int(self.num_pages[slot])]
        groups = range(slot * self._shards, (slot + 1) * self._shards)
        fills = [int(self.num_tokens[g]) % self.page_size for g in groups]
        open_parts = [self.buffer_position[g, :fill] for g, fill in zip(groups, fills)]
        return torch.cat([self.pool.position[pages].reshape(-1), *open_parts])

    def check_integrity(self) -> None:
        """Every page is free or in exactly one table, and the counts agree."""
        used = [self.page_table[s, : int(self.num_pages[s])] for s in range(self.num_slots)]
        every = torch.cat([*used, self.pool.free_pages()]).sort().values
        assert torch.equal(every, torch.arange(self.pool.num_pages, device=every.device)), (
            "pages lost or held twice"
        )
        per_slot = (self.num_tokens[:-1] // self.page_size).view(self.num_slots, -1).sum(1)
        assert torch.equal(per_slot, self.num_pages[:-1]), "page counts disagree with token counts"

    def _group(self, block: TokenBlock) -> torch.Tensor:
        mine = (block.slot >= 0) & (self.placement.owner(block.shard) == self.placement.rank)
        group = block.slot * self._shards + self.placement.local_shard(block.shard)
        return torch.where(mine, group, self.num_slots * self._shards)

    def _number(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Number each token within its group; also the groups' full pages before and after."""
        order = torch.argsort(group, stable=True)
        added = torch.zeros_like(self.num_tokens).scatter_add_(0, group, torch.ones_like(group))
        start = torch.cumsum(added, 0) - added
        ranked = torch.arange(group.numel(), device=group.device) - start[group[order]]
        index = self.num_tokens[group] + torch.empty_like(ranked).scatter_(0, order, ranked)
        before = self.num_tokens // self.page_size
        self.num_tokens += added
        self.num_tokens[-1] = 0
        after = self.num_tokens // self.page_size
        return index, before, after

    def _seal(
        self, before: torch.Tensor, after: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give every full buffer a page. Returns the pages [c] and each group's first of them."""
        sealed = after - before
        last = torch.cumsum(sealed, 0)
        first = last - sealed
        count = self._most_sealed(last, num_tokens)
        if count == 0:
            return last[:0], first
        self.pool.reserve(count)
        number = torch.arange(count, device=last.device)
        is_used = number < last[-1]
        pages = self.pool.allocate(is_used)
        group = torch.searchsorted(last, number, right=True).clamp_(max=last.numel() - 1)
        slot = group // self._shards
        offset = number - first[slot * self._shards] + self.num_pages[slot]
        column = torch.where(is_used, offset, self.page_table.shape[1] - 1)
        self.page_table[slot, column] = pages
        self.num_pages[:-1] += sealed[:-1].view(self.num_slots, self._shards).sum(1)
        shard = (group % self._shards) * self.placement.num_ranks + self.placement.rank
        self.pool.shard[pages] = shard.to(torch.int32)
        self._copy_buffers(pages, group)
        return pages, first

    def _most_sealed(self, last: torch.Tensor, num_tokens: int) -> int:
        """How many pages a block seals: exact where asking is free, else a bound."""
        if last.is_cpu:
            return int(last[-1])
        return num_tokens // self.page_size + min(num_tokens, last.numel())

    def _copy_buffers(self, pages: torch.Tensor, group: torch.Tensor) -> None:
        self.pool.keys[:, pages] = self.buffer_keys[:, group]
        self.pool.values[:, pages] = self.buffer_values[:, group]
        self.pool.position[pages] = self.buffer_position[group]
        if self.buffer_earlier is not None:
            self.pool.earlier_shards[pages] = self.buffer_earlier[group]

    def _write(self, block, group, index, before, after, pages, first) -> None:
        offset = index % self.page_size
        in_page = index < after[group] * self.page_size
        if pages.numel():
            number = first[group] + index // self.page_size - before[group]
            page = pages[number.clamp(0, pages.numel() - 1)]
            page = torch.where(in_page, page, self.pool.num_pages)
            self.pool.keys[:, page, offset] = block.keys
            self.pool.values[:, page, offset] = block.values
            self.pool.position[page, offset] = block.position.to(torch.int32)
            if self.buffer_earlier is not None:
                self.pool.earlier_shards[page, offset] = block.earlier_shards
        group = torch.where(in_page, self.num_tokens.numel() - 1, group)
        self.buffer_keys[:, group, offset] = block.keys
        self.buffer_values[:, group, offset] = block.values
        self.buffer_position[group, offset] = block.position.to(torch.int32)
        if self.buffer_earlier is not None:
            self.buffer_earlier[group, offset] = block.earlier_shards

    def _attend_pages(self, query, slots, visited, softmax_scale) -> AttentionState:
        counts = self.num_pages[slots]
        width = int(counts.max()) if counts.numel() else 0
        table = self.page_table[slots, :width]
        is_page = torch.arange(width, device=slots.device) < counts.unsqueeze(1)
        table = torch.where(is_page, table, self.pool.num_pages)
        if visited is not None:
            is_page = is_page & _is_visited(visited.unsqueeze(1), self.pool.shard[table].long())
        mask = is_page.unsqueeze(2).expand(-1, -1, self.page_size)
        if self.buffer_earlier is not None:
            mask = mask & self._is_first_replica(self.pool.earlier_shards[table], visited)
        return decode_attention(
            query, self.pool.keys, self.pool.values, table, mask.reshape(slots.numel(), -1),
            softmax_scale,
        )

    def _attend_buffers(self, query, slots, visited, softmax_scale) -> AttentionState:
        local = torch.arange(self._shards, device=slots.device)
        table = slots.unsqueeze(1) * self._shards + local
        table = table.clamp_(max=self.num_tokens.numel() - 1)  # rows of padding
        fill = self.num_tokens[table] % self.page_size
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


def _is_visited(visited: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    return ((visited >> shard.clamp(min=0)) & 1).bool() & (shard >= 0)
