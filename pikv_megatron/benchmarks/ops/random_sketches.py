"""Sketches of the pages of a cache, and their logits in float64.

Legend: ng KV heads, g query heads a KV head, p pages, S tokens a page, w width, r directions.
"""

import torch

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.packing import unpack
from pikv_megatron.types import BoundingBoxSketch, LowRankSketch, MeanKeySketch, PageSketch

SKETCHES = ("mean key", "box", "low rank")
# Directions of a low-rank sketch and bits of their codes: the first channels serve as directions,
# since the keys are random and only time is measured.
RANK, BITS = 32, 2


def sketch_of(kind: str, keys: torch.Tensor) -> PageSketch:
    """The sketches of keys [ng, p, S, hn], in the type of the keys."""
    num_groups, num_pages, page_size, width = keys.shape
    heads = (num_groups, num_pages + 1)  # the last row is a null row
    if kind == "low rank":
        keys = keys[..., :RANK]
        half = keys.new_zeros(2, *heads, RANK, dtype=torch.float16)
        codes = keys.new_zeros(*heads, page_size * BITS // 8, RANK, dtype=torch.uint8)
        residual = keys.new_zeros(heads, dtype=torch.float32)
        sketch = LowRankSketch(codes, half[0], half[1], residual, page_size)
    elif kind == "box":
        sketch = BoundingBoxSketch(*keys.new_zeros(2, *heads, width))
    else:
        sketch = MeanKeySketch(keys.new_zeros(*heads, width))
    make_sketch(keys, sketch, torch.arange(num_pages, device=keys.device))
    return sketch


def exact_logits(query: torch.Tensor, sketch: PageSketch) -> torch.Tensor:
    """The largest logit of a page, unscaled, [np, w] -> [np, p], one KV head at a time."""
    grouped = query.double().unflatten(0, (sketch[0].shape[0], -1))
    return torch.cat([_group_logits(rows, sketch, index) for index, rows in enumerate(grouped)])


def _group_logits(rows: torch.Tensor, sketch: PageSketch, group: int) -> torch.Tensor:
    """[g, w] -> [g, p]; the null row is left out."""
    if isinstance(sketch, MeanKeySketch):
        return rows @ sketch.mean[group, :-1].double().T
    if isinstance(sketch, BoundingBoxSketch):
        low, high = (x[group, :-1].double() for x in sketch)
        return rows.clamp(max=0) @ low.T + rows.clamp(min=0) @ high.T
    codes = unpack(sketch.codes[group, :-1], 8 * sketch.codes.shape[2] // sketch.page_size)
    scale, zero = (x[group, :-1].double().unsqueeze(1) for x in (sketch.scale, sketch.zero))
    tokens = codes.double() * scale + zero
    return torch.einsum("gw,psw->gps", rows, tokens).amax(dim=2)
