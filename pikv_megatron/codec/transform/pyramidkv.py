"""Pooled tokens (paper, Table 2, C_Py).

Legend: ng KV heads, c pages, S tokens a page, hn head width.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.codec.transform.base import KVTransform, TransformOptions
from pikv_megatron.types import Ageing, KVShape


class PyramidKVOptions(TransformOptions):
    """Neighbours are stored as their mean, which counts as often as they are many.

    A layer's budget is its `level`, by `layers`: at level l, 2^l neighbours are one when their page
    is sealed. With `young`, older pages of a shard are pooled again, two pages to one, then two of
    those, and so on. The squared error is that of K less the means, |P_l K - K|^2.
    """

    name: Literal["pyramidkv"] = "pyramidkv"
    level: int = Field(1, ge=0, le=6, description="l: 2^l neighbours are stored as one")
    young: int | None = Field(
        None, ge=1, description="pages of a shard that are pooled no further; null: all of them"
    )
    levels: int = Field(3, ge=1, le=8, description="times that older pages are pooled, at most")

    @property
    def ageing(self):
        return None if self.young is None else Ageing(self.young, self.levels)

    def build(self, kv, num_slots, moments=None, num_bases=1):
        return PoolingTransform(kv, 2**self.level) if self.level else None


class PoolingTransform(KVTransform):
    """A mean of m keys gets log m on its logit: where the m are alike, nothing is lost."""

    def __init__(self, kv: KVShape, pooled: int):
        self.key_width, self.value_width = kv.key_width, kv.value_width
        self.pooled = pooled

    def encode(self, keys, values, slots):
        return self._pool(keys), self._pool(values)

    def decode(self, keys, values, slots):
        return tuple(x.float().repeat_interleave(self.pooled, dim=2) for x in (keys, values))

    def absorb(self, query, slots):
        return query, None

    def emit(self, out, slots):
        return out

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """[ng, c, S, w] -> [ng, c, S / pooled, w]."""
        return x.float().unflatten(2, (-1, self.pooled)).mean(dim=3)
