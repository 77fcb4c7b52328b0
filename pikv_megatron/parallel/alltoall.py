"""Dispatch by all-to-all: a query goes only to the owners of the shards it visits."""

import deepspeed.comm as dist
import torch

from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.shard_store import OwnerReads
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.parallel.dispatcher import (
    COMBINE_OP,
    FLUSH_OP,
    QUERY_OP,
    KVDispatcher,
    PendingQuery,
    merge_parts,
    pack_states,
    shard_bits,
)


class AllToAllDispatcher(KVDispatcher):
    """Uneven splits; without routing the host knows them all, so nothing synchronises.

    Args:
        placement: which rank owns which shard.
        group: the expert-parallel process group.
    """

    def __init__(self, placement: Placement, group):
        super().__init__(placement)
        self.group = group

    def dispatch(self, query, plan, reads):
        if reads.shards is None:
            return self._dispatch_everywhere(query, plan, reads.pages)
        return self._dispatch_visited(query, plan, reads)

    def combine(self, pending, store, query, near, softmax_scale):
        near_state, _ = decode_attention(query, [near], softmax_scale)
        if pending.work is not None:
            pending.work.wait()
        state = store.attend(pending.query, pending.reads, softmax_scale, [])
        sent, received, rows = pending.route
        packed = self._exchange(pack_states(state), received, sent, COMBINE_OP)
        return merge_parts(self._by_row(packed, rows, query.shape[0]), near_state)

    def send(self, block, plan, copies):
        owner = self.placement.owner(block.shard)
        order = torch.argsort(owner, stable=True)
        sent = torch.bincount(owner, minlength=self.placement.num_ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group, log_name=FLUSH_OP)
        splits = sent.tolist(), received.tolist()
        header = torch.stack(
            [block.slot, block.shard, block.position, block.earlier_shards], dim=1
        )
        tokens = torch.stack([block.keys, block.values]).permute(2, 0, 1, 3)  # [t, 2, ng, hn]
        header = self._exchange(header[order], *splits, FLUSH_OP)
        tokens = self._exchange(tokens[order], *splits, FLUSH_OP)
        keys, values = tokens.permute(1, 2, 0, 3)
        return TokenBlock(keys, values, *header.unbind(1))

    def _dispatch_everywhere(self, query, plan, pages) -> PendingQuery:
        ranks = self.placement.num_ranks
        sent = [plan.num_rows] * ranks
        received = [len(slots) for slots in plan.slots_by_rank]
        copies = query.unsqueeze(0).expand(ranks, *query.shape).flatten(0, 1)
        arrived = query.new_empty(sum(received), *query.shape[1:])
        work = dist.all_to_all_single(
            arrived, copies.contiguous(), received, sent, group=self.group, async_op=True,
            log_name=QUERY_OP,
        )
        if pages is not None:
            pages = self._exchange(pages.transpose(0, 1).flatten(0, 1), sent, received, QUERY_OP)
        rows = torch.arange(plan.num_rows, device=query.device).repeat(ranks)
        every = plan.all_reads._replace(selected=pages)
        return PendingQuery(arrived, every, work, (sent, received, rows))

    def _dispatch_visited(self, query, plan, reads) -> PendingQuery:
        ranks = self.placement.num_ranks
        to_rank = reads.shards.unflatten(1, (-1, ranks)).any(dim=1)  # shard s: rank s mod G
        rank_of, rows = to_rank.t().nonzero(as_tuple=True)
        sent = torch.bincount(rank_of, minlength=ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group, log_name=QUERY_OP)
        splits = sent.tolist(), received.tolist()
        header = torch.stack([plan.slots[rows], shard_bits(reads.shards)[rows]], dim=1)
        header = self._exchange(header, *splits, QUERY_OP)
        arrived = self._exchange(query[rows], *splits, QUERY_OP)
        pages = reads.pages
        if pages is not None:
            pages = self._exchange(pages[rows, rank_of], *splits, QUERY_OP)
        slots, bits = header.unbind(1)
        some = OwnerReads(slots, plan.num_columns, visited=bits, selected=pages)
        return PendingQuery(arrived, some, route=(*splits, rows))

    def _by_row(self, packed: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Parts [parts, sq, np, hn + 1], part i of row rows[i] -> [ranks, num_rows, ...]."""
        ranks = self.placement.num_ranks
        if rows.numel() == ranks * num_rows:
            return packed.view(ranks, num_rows, *packed.shape[1:])
        order = torch.argsort(rows, stable=True)
        rows = rows[order]
        first = torch.searchsorted(rows, torch.arange(num_rows, device=rows.device))
        place = torch.arange(rows.numel(), device=rows.device) - first[rows]
        parts = packed.new_zeros(ranks, num_rows, *packed.shape[1:])
        parts[..., -1] = -torch.inf
        parts[place, rows] = packed[order]
        return parts

    def _exchange(
        self, rows: torch.Tensor, sent: list[int], received: list[int], name: str
    ) -> torch.Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(
            arrived, rows.contiguous(), received, sent, group=self.group, log_name=name
        )
        return arrived
