"""Routing by the hash that places tokens (paper, Table 1, R_B)."""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.router.base import KVRouter, VisitingOptions


class HashOptions(VisitingOptions):
    """The shard of the query's own position, and those behind it: what the paper starts from."""

    name: Literal["hash"] = "hash"
    block: int = Field(64, ge=1, description="neighbours that visit the same shards")

    def build(self, num_slots, num_shards, device):
        return RunRouter(self.k, num_shards, self.block, 1)


class RunRouter(KVRouter):
    """Visits k neighbouring shards; every `block` positions the first of them moves by `stride`.

    Example:
        Four shards, k = 2, a block of 1 and a stride of 2: shards 0 and 1, 2 and 3, 0 and 1, ...
    """

    def __init__(self, k: int, num_shards: int, block: int, stride: int):
        self._k, self._num_shards = k, num_shards
        self._block, self._stride = block, stride

    def visit(self, ask):
        first = ask.positions // self._block * self._stride
        shard = torch.arange(self._num_shards, device=first.device)
        return (shard - first.unsqueeze(1)) % self._num_shards < self._k
