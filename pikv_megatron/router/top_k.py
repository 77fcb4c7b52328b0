"""Top-k routing (paper, Table 1, R_T), over the relevance of what shards hold."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.ops.route_topk import route_topk
from pikv_megatron.router.base import KVRouter, RouterOptions


class TopKOptions(RouterOptions):
    """The k shards whose pages promise the most attention."""

    name: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1, description="shards to visit")
    source: Literal["relevance"] = Field(
        "relevance", description="logits of the shards: page scores summed per shard"
    )

    needs_sketch: ClassVar[bool] = True

    def build(self):
        return TopKRouter(self.k)


class TopKRouter(KVRouter):
    """A softmax would not change the order, so it is left out."""

    def __init__(self, k: int):
        self._k = k

    def visit(self, ask):
        scores = ask.shard_scores()
        return route_topk(scores, torch.zeros_like(scores[:1]), self._k)
