"""A page as its tokens' keys in a few leading directions, at 2 or 4 bits (Loki, arXiv 2406.02542).

Legend: ng KV heads, g query heads a KV head, c pages, S tokens a page, hn head width, r directions.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.principal_directions import principal_directions
from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.sketch.base import PageSketcher, SketchOptions
from pikv_megatron.types import KVShape, LowRankSketch, MeanKeySketch


class LowRankOptions(SketchOptions):
    """Every token's key about its page's mean, in leading directions of its prompt, 2 or 4 bits
    each.
    """

    name: Literal["low_rank"] = "low_rank"
    rank: int | None = Field(None, ge=1, description="directions; null: half the width")
    bits: Literal[2, 4] = Field(2, description="of a number")

    def build(self, kv, page_size, num_slots):
        rank = self.rank or max(1, kv.key_width // 2)
        if rank > kv.key_width:
            raise ValueError(
                f"sketch.rank {rank} exceeds the width of a key, {kv.key_width}: lower it"
            )
        if page_size * self.bits % 8:
            raise ValueError(
                f"sketch.bits {self.bits}: a page of {page_size} tokens does not fill whole bytes; "
                f"make page_size a multiple of {8 // self.bits}"
            )
        return LowRankSketcher(kv, page_size, num_slots, rank, self.bits)


class CentredSketch(NamedTuple):
    """A `LowRankSketch` of keys about their page's mean, and that mean, [ng, p, hn]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    residual: torch.Tensor
    page_size: int
    mean: torch.Tensor

    @property
    def tokens(self) -> LowRankSketch:
        return LowRankSketch(*self[:5])


class LowRankSketcher(PageSketcher):
    """Directions are those in which the keys of a sequence's first pages differ within a page.

    What a page's keys have in common is kept in full. Directions are learned once, and RoPE turns
    its slow channels further than the first pages show: without its mean, a page decoded 500
    tokens later was misjudged by up to 6 nats.
    """

    learns = True

    def __init__(self, kv: KVShape, page_size: int, num_slots: int, rank: int, bits: int):
        super().__init__(kv, page_size)
        self._rank, self._bits = rank, bits
        self._fitted: set[int] = set()
        self._basis = torch.zeros(
            num_slots, kv.num_groups, kv.key_width, rank, device=kv.device
        )

    def allocate(self, num_pages):
        ng, rank, device = self.kv.num_groups, self._rank, self.kv.device
        rows = self.page_size * self._bits // 8
        scale, zero = (
            torch.zeros(ng, num_pages, rank, dtype=torch.float16, device=device) for _ in range(2)
        )
        return CentredSketch(
            torch.zeros(ng, num_pages, rows, rank, dtype=torch.uint8, device=device), scale, zero,
            torch.zeros(ng, num_pages, device=device), self.page_size,
            torch.zeros(ng, num_pages, self.kv.key_width, dtype=self.kv.dtype, device=device),
        )

    def fit(self, slot, keys):
        centred = keys.float().unflatten(1, (-1, self.page_size))
        centred = (centred - centred.mean(dim=2, keepdim=True)).flatten(1, 2)
        self._basis[slot] = principal_directions(centred, self._rank)[1]
        self._fitted.add(slot)

    def is_fitted(self, slot):
        return slot in self._fitted

    def forget(self, slot):
        self._fitted.discard(slot)

    def write(self, keys, sketch, page, slots):
        mean = keys.float().mean(dim=2)
        sketch.mean[:, page] = mean.to(sketch.mean.dtype)
        basis = self._basis[slots].transpose(0, 1)
        make_sketch(torch.matmul(keys.float() - mean.unsqueeze(2), basis), sketch.tokens, page)

    def logits(self, query, sketch, table, lens, slots, softmax_scale):
        heads = query.float().unflatten(1, (self.kv.num_groups, -1))  # [n, ng, g, hn]
        projected = torch.matmul(heads, self._basis[slots]).flatten(1, 2)
        logit = sum(
            score_pages(x, part, table, lens, 0, softmax_scale, statistic).logit
            for x, part, statistic in (
                (projected, sketch.tokens, "mass"), (query, MeanKeySketch(sketch.mean), "best")
            )
        )
        score = logit.softmax(dim=2).mean(dim=1).masked_fill(lens == 0, 0.0)
        return logit, score

    def tensors(self):
        return [self._basis]
