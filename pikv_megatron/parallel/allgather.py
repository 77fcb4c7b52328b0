"""Dispatch by all-gather: every rank sees every row, and all shapes are fixed."""

from collections.abc import Sequence

import deepspeed.comm as dist
import torch

from pikv_megatron.parallel.dispatcher import (
    COMBINE_OP,
    FLUSH_OP,
    QUERY_OP,
    KVDispatcher,
)
from pikv_megatron.parallel.packet import pack_rows, unpack_rows


class AllGatherDispatcher(KVDispatcher):
    """Two collectives a layer; rows are padded to the largest number on any rank.

    Args:
        group: the expert-parallel process group.
    """

    def __init__(self, group):
        super().__init__(group.size(), group.rank())
        self.group = group

    def post(self, rows, own, counts, goes_to=None):
        fields = [rows] if own is None else [rows, own]
        route = self.everywhere(counts)
        packed = pack_rows(fields)
        route.arrived, route.work = self._gather(packed, counts, QUERY_OP, async_op=True)
        return route

    def wait(self, route, rows, own):
        route.work.wait()
        arrived = _strip(route.arrived, route.counts)
        fields = unpack_rows(arrived, [rows] if own is None else [rows, own])
        return fields[0], None if own is None else fields[1][:, self.rank]

    def give_back(self, route, results, name=COMBINE_OP):
        padded = [_pad(part, max(route.counts)) for part in results.split(list(route.counts))]
        packed = torch.stack(padded)
        home = torch.empty_like(packed)
        dist.all_to_all_single(home, packed, group=self.group, log_name=name)
        return home[:, : route.num_rows]

    def send(self, rows, owner, counts):
        arrived, _ = self._gather(rows, counts, FLUSH_OP)
        return _strip(arrived, counts)

    def _gather(
        self, rows: torch.Tensor, counts: Sequence[int], name: str, async_op: bool = False
    ):
        """[t, bytes] of every rank -> [G, most, bytes]."""
        padded = _pad(rows, max(counts)).contiguous()
        gathered = rows.new_empty(self.num_ranks, *padded.shape)
        work = dist.all_gather_into_tensor(
            gathered.flatten(0, 1), padded, group=self.group, async_op=async_op, log_name=name
        )
        return gathered, work


def _pad(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Pad the first dimension to `count` rows."""
    if rows.shape[0] == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _strip(gathered: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """[G, most, ...] -> [sum of counts, ...], without the padding."""
    if min(counts) == gathered.shape[1]:
        return gathered.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])
