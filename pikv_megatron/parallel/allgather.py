"""Dispatch by all-gather: every rank sees every query, and all shapes are fixed."""

import deepspeed.comm as dist
import torch

from pikv_megatron.cache.placement import Placement
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


class AllGatherDispatcher(KVDispatcher):
    """Two collectives a layer; rows are padded to the largest number on any rank.

    Args:
        placement: which rank owns which shard.
        group: the expert-parallel process group.
    """

    def __init__(self, placement: Placement, group):
        super().__init__(placement)
        self.group = group

    def dispatch(self, query, plan, reads):
        gathered, work = self._gather(_pad(query, plan.max_rows), QUERY_OP, async_op=True)
        bits, pages = shard_bits(reads.shards), reads.pages
        if bits is not None:
            bits, _ = self._gather(_pad(bits, plan.max_rows), QUERY_OP)
        if pages is not None:
            pages, _ = self._gather(_pad(pages, plan.max_rows), QUERY_OP)
            pages = pages[:, self.placement.rank]
        padded = plan.padded_reads._replace(visited=bits, selected=pages)
        return PendingQuery(gathered, padded, work)

    def combine(self, pending, store, query, near, softmax_scale):
        near_state, _ = decode_attention(query, [near], softmax_scale)
        pending.work.wait()
        packed = pack_states(store.attend(pending.query, pending.reads, softmax_scale, []))
        home = torch.empty_like(packed)
        dist.all_to_all_single(home, packed, group=self.group, log_name=COMBINE_OP)
        parts = home.unflatten(0, (self.placement.num_ranks, -1))
        return merge_parts(parts[:, : query.shape[0]], near_state)

    def send(self, block, plan, copies):
        most = max(plan.flush.count_by_rank) * copies
        header = torch.stack(
            [block.slot, block.shard, block.position, block.earlier_shards], dim=1
        )
        tokens = torch.stack([block.keys, block.values]).permute(2, 0, 1, 3)  # [t, 2, ng, hn]
        header, _ = self._gather(_pad(header, most, fill=-1), FLUSH_OP)
        tokens, _ = self._gather(_pad(tokens, most), FLUSH_OP)
        keys, values = tokens.permute(1, 2, 0, 3)
        return TokenBlock(keys, values, *header.unbind(1))

    def _gather(self, rows: torch.Tensor, name: str, async_op: bool = False):
        gathered = rows.new_empty(self.placement.num_ranks * rows.shape[0], *rows.shape[1:])
        work = dist.all_gather_into_tensor(
            gathered, rows.contiguous(), group=self.group, async_op=async_op, log_name=name
        )
        return gathered, work


def _pad(rows: torch.Tensor, count: int, fill: int = 0) -> torch.Tensor:
    """Pad the first dimension to `count` rows."""
    if rows.shape[0] == count:
        return rows
    missing = rows.new_full((count - rows.shape[0], *rows.shape[1:]), fill)
    return torch.cat([rows, missing])
