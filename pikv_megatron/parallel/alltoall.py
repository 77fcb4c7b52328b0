"""Dispatch by all-to-all: a row goes only to the owners that it visits."""

import deepspeed.comm as dist
import torch

from pikv_megatron.parallel.dispatcher import (
    COMBINE_OP,
    FLUSH_OP,
    QUERY_OP,
    KVDispatcher,
)
from pikv_megatron.parallel.packet import pack_rows, unpack_rows


class AllToAllDispatcher(KVDispatcher):
    """Uneven splits; where every row goes to all, the host knows them and nothing synchronises.

    Args:
        group: the expert-parallel process group.
    """

    def __init__(self, group):
        super().__init__(group.size(), group.rank())
        self.group = group

    def post(self, rows, own, counts, goes_to=None):
        route = self.everywhere(counts)
        if goes_to is None:
            common = rows.expand(self.num_ranks, *rows.shape).flatten(0, 1)
            mine = None if own is None else own.transpose(0, 1).flatten(0, 1)
        else:
            route.places = goes_to.t().nonzero()
            route.sent, route.received = self._exchange_counts(
                goes_to.sum(dim=0), QUERY_OP
            )
            owner, row = route.places.unbind(1)
            common, mine = rows[row], None if own is None else own[row, owner]
        packed = pack_rows([common] if own is None else [common, mine])
        route.arrived, route.work = self._exchange(
            packed, route.sent, route.received, QUERY_OP, async_op=True
        )
        return route

    def wait(self, route, rows, own):
        route.work.wait()
        like = [rows] if own is None else [rows, own[:, 0]]
        fields = unpack_rows(route.arrived, like)
        return fields[0], None if own is None else fields[1]

    def give_back(self, route, results, name=COMBINE_OP):
        home, _ = self._exchange(results, route.received, route.sent, name)
        if route.places is None:
            return home.view(self.num_ranks, route.num_rows, *home.shape[1:])
        shape = self.num_ranks, route.num_rows, *home.shape[1:]
        parts = home.new_full(shape, -torch.inf)
        owner, row = route.places.unbind(1)
        parts[owner, row] = home
        return parts

    def send(self, rows, owner, counts):
        order = torch.argsort(owner, stable=True)
        sent = torch.bincount(owner, minlength=self.num_ranks)
        splits = self._exchange_counts(sent, FLUSH_OP)
        return self._exchange(rows[order], *splits, FLUSH_OP)[0]

    def _exchange_counts(self, sent: torch.Tensor, name: str) -> tuple[list[int], list[int]]:
        """Rows to and from every rank; the host waits for them."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group, log_name=name)
        return sent.tolist(), received.tolist()

    def _exchange(
        self, rows: torch.Tensor, sent: list[int], received: list[int], name: str,
        async_op: bool = False,
    ):
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arrived, rows.contiguous(), received, sent, group=self.group, async_op=async_op,
            log_name=name,
        )
        return arrived, work
