"""Bounds on what pages have, from sketches in a few directions.

Legend: ng KV heads, c pages, S tokens a page, r directions.
"""

import torch

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.packing import HALF_MAX, ceil_half, unpack
from pikv_megatron.ops.page_logits import ROUNDING
from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.sketch.low_rank_sketcher import CentredSketch, LowRankSketcher
from pikv_megatron.types import LowRankSketch, MeanKeySketch


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
