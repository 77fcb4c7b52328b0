"""Makes what a home rank remembers of pages.

Legend: ng KV heads, c full buffers, p rows of the sketch, S tokens a page, w width of the keys
(r directions for a low-rank sketch).
"""

import torch

from pikv_megatron.ops.backend import kernel_op
from pikv_megatron.ops.packing import pack, quantise_covering
from pikv_megatron.types import BoundingBoxSketch, LowRankSketch, MeanKeySketch, PageSketch


def make_sketch(
    keys: torch.Tensor,
    sketch: PageSketch,
    page: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """Sketch buffer i into row page[i], in place.

    Mean keys; bounding boxes (Quest, arXiv 2406.10774); or every token in r leading directions
    (Loki, arXiv 2406.02542), quantised to 2 or 4 bits per channel of the page.

    Args:
        keys: [ng, c, S, w], any floating dtype and strides; already projected to the r directions
            for a low-rank sketch, because the caller knows the basis and can share the product.
        sketch: its last row is a null row, whose content nobody reads.
        page: [c], int64; negative loses the sketch.
        residual: [ng, c], the largest norm, over a page's tokens, of a key less what the r
            directions hold of it. Only a low-rank sketch needs it; None: infinite, no bound.

    Raises:
        ValueError: boxes are of a narrower dtype than the keys, which could fall out of them.
    """
    if isinstance(sketch, BoundingBoxSketch) and sketch.low.dtype not in (
        keys.dtype, torch.float32
    ):
        raise ValueError(
            f"sketch.low is {sketch.low.dtype} and keys are {keys.dtype}: rounded boxes would not "
            "contain their keys; allocate the sketch in the dtype of the keys"
        )
    kernel = kernel_op("make_sketch", keys)
    if kernel is not None:
        return kernel(keys, sketch, page, residual)
    fields = _sketch(keys, sketch, residual)
    for name, part in fields.items():
        kept = getattr(sketch, name)
        place = torch.where(page < 0, kept.shape[1] - 1, page)
        kept[:, place] = part.to(kept.dtype)


def _sketch(
    keys: torch.Tensor, sketch: PageSketch, residual: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    if isinstance(sketch, MeanKeySketch):
        return {"mean": keys.float().mean(dim=2)}
    if isinstance(sketch, BoundingBoxSketch):
        low, high = keys.aminmax(dim=2)
        return {"low": low, "high": high}
    return _low_rank(keys, sketch, residual)


def _low_rank(
    keys: torch.Tensor, sketch: LowRankSketch, residual: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    bits = sketch.codes.shape[2] * 8 // sketch.page_size
    codes, scale, zero = quantise_covering(keys, bits, dim=2)
    if residual is None:
        residual = sketch.residual.new_full(keys.shape[:2], torch.inf)
    return {
        "codes": pack(codes, bits), "scale": scale.squeeze(2), "zero": zero.squeeze(2),
        "residual": residual,
    }
