"""Top-k routing (paper, Table 1, R_T), over the relevance of what shards hold."""

from typing import Literal

import torch

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter
from pikv_megatron.router.gate import GateOptions


class TopKOptions(GateOptions):
    """The k shards whose pages promise the most attention."""

    name: Literal["top_k"] = "top_k"

    def build(self, num_slots, num_shards, device):
        return TopKRouter(self.k)


class TopKRouter(KVRouter):
    """A softmax would not change the order, so it is left out."""

    def __init__(self, k: int):
        self._k = k

    def visit(self, ask):
        scores = ask.shard_scores()
        return route_topk(scores, torch.zeros_like(scores[:1]), self._k)
