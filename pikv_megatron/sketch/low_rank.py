"""A page as its tokens' keys in a few leading directions, at 2 or 4 bits (Loki, arXiv 2406.02542).

Legend: ng KV heads, g query heads a KV head, c pages, S tokens a page, hn head width, r directions.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.packing import HALF_MAX, ceil_half, unpack
from pikv_megatron.ops.page_logits import ROUNDING
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

    can_bound: ClassVar[bool] = True

    def build(self, kv, page_size, num_slots, bounds=False):
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
        kind = BoundingLowRankSketcher if bounds else LowRankSketcher
        return kind(kv, page_size, num_slots, rank, self.bits)


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
    extra = 0  # channels besides the directions

    def __init__(self, kv: KVShape, page_size: int, num_slots: int, rank: int, bits: int):
        super().__init__(kv, page_size)
        self._rank, self._bits = rank, bits
        self._fitted: set[int] = set()
        self._basis = torch.zeros(
            num_slots, kv.num_groups, kv.key_width, rank, device=kv.device
        )

    def allocate(self, num_pages):
        ng, width, device = self.kv.num_groups, self._rank + self.extra, self.kv.device
        rows = self.page_size * self._bits // 8
        scale, zero = (
            torch.zeros(ng, num_pages, width, dtype=torch.float16, device=device) for _ in range(2)
        )
        return CentredSketch(
            torch.zeros(ng, num_pages, rows, width, dtype=torch.uint8, device=device), scale, zero,
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
        centred, basis = self._centred(keys, sketch, page), self._basis[slots].transpose(0, 1)
        make_sketch(torch.matmul(centred, basis), sketch.tokens, page)

    def logits(self, query, sketch, table, lens, slots, softmax_scale):
        asked = table, lens, 0, softmax_scale
        tokens = self._directions(sketch)
        logit = score_pages(self._projected(query, slots), tokens, *asked, "mass").logit
        logit = logit + score_pages(query, MeanKeySketch(sketch.mean), *asked, "best").logit
        score = logit.softmax(dim=2).mean(dim=1).masked_fill(lens == 0, 0.0)
        return logit, score

    def tensors(self):
        return [self._basis]

    def _centred(self, keys: torch.Tensor, sketch: CentredSketch, page) -> torch.Tensor:
        """Note the means of pages [ng, c, S, hn]; the keys about what is noted, float32."""
        mean = keys.float().mean(dim=2).to(sketch.mean.dtype)
        sketch.mean[:, page] = mean
        return keys.float() - mean.float().unsqueeze(2)

    def _projected(self, query: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Query [n, np, hn] in the directions of its sequence, [n, np, r], float32."""
        heads = query.float().unflatten(1, (self.kv.num_groups, -1))  # [n, ng, g, hn]
        return torch.matmul(heads, self._basis[slots]).flatten(1, 2)

    def _directions(self, sketch: CentredSketch) -> LowRankSketch:
        return sketch.tokens


class BoundingLowRankSketcher(LowRankSketcher):
    """Remembers of every token how far its key lies from what is sketched of it.

    By Cauchy-Schwarz |q . k - q . k^| <= |q| |k - k^|. The distance is one more channel of k^,
    rounded up: with one more channel of |q| or -|q|, the sketch's logits are bounds. Distances are
    from what is stored, so a basis, a step or a saturated scale can be as bad as they like.
    """

    extra = 1

    def write(self, keys, sketch, page, slots):
        centred, basis = self._centred(keys, sketch, page), self._basis[slots].transpose(0, 1)
        rows = torch.nn.functional.pad(torch.matmul(centred, basis), (0, 1))
        make_sketch(rows, sketch.tokens, page)
        stored = self._stored(sketch, page)[..., :-1]
        away = (centred - torch.matmul(stored, basis.transpose(2, 3))).norm(dim=3)
        # What a logit's own sums are rounded by, at most.
        sizes = sum(x.float().norm(dim=3) for x in (keys, centred, stored))
        rows[..., -1] = away * (1 + ROUNDING) + sizes * ROUNDING
        make_sketch(rows, sketch.tokens, page)
        # Codes are the nearest: half a step more, and they are not below.
        scale, zero = sketch.scale[:, page, -1].float(), sketch.zero[:, page, -1].float()
        is_held = rows[..., -1].amax(dim=2) < HALF_MAX
        up = ceil_half(zero + 0.51 * scale)
        sketch.zero[:, page, -1] = torch.where(is_held, up, torch.inf).half()

    def bounds(self, query, sketch, table, lens, slots, softmax_scale):
        asked = table, lens, 0, softmax_scale
        projected, norm = self._projected(query, slots), query.float().norm(dim=2, keepdim=True)
        mean = score_pages(query, MeanKeySketch(sketch.mean), *asked, "best").logit
        lower, upper = (
            score_pages(torch.cat([projected, x], 2), sketch.tokens, *asked, "mass").logit + mean
            for x in (-norm, norm)
        )
        # Where a distance is infinite, nothing is known.
        none, all_there_is = -torch.inf, torch.inf
        return (
            lower.nan_to_num(none, all_there_is, none),
            upper.nan_to_num(all_there_is, all_there_is, none),
        )

    def _directions(self, sketch):
        codes, scale, zero = (x[..., :-1] for x in sketch[:3])
        return LowRankSketch(codes, scale, zero, sketch.residual, sketch.page_size)

    def _stored(self, sketch: CentredSketch, page: torch.Tensor) -> torch.Tensor:
        """[ng, c, S, r + 1], float32: what codes stand for."""
        codes = unpack(sketch.codes[:, page], self._bits).float()
        return codes * sketch.scale[:, page].float().unsqueeze(2) + (
            sketch.zero[:, page].float().unsqueeze(2)
        )
