"""How much each page matters to a query, from sketches: `score_pages.cpp`."""

from typing import Any

import torch

from pikv_kernels.cpu.fields import NO_SIDE, TYPES, address, pool_fields, row_fields, side_fields
from pikv_kernels.cpu.compiled import call

MEAN, BOX, LOW_RANK = range(3)


def score_pages(
    query: torch.Tensor, sketch: Any, table: torch.Tensor, lens: torch.Tensor, k: int,
    softmax_scale: float, statistic: str, query_residual: torch.Tensor | None, bound: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, np, m], scores [n, m] and the best k columns [n, k], int64, of the listed pages.

    Args:
        query: [n, np, w].
        sketch: a `PageSketch`.
        table: [n, m], int64.
        lens: [n, m], int32.
        statistic: "mass" or "best".
        query_residual: [n, np] or None.
    """
    n, num_heads, width = query.shape
    rows = query.float().contiguous()
    residual = None if query_residual is None else query_residual.float().contiguous()
    logit, score = torch.empty(n, num_heads, table.shape[1]), torch.empty(table.shape)
    chosen = torch.empty(n, k, dtype=torch.int64)
    fields = [
        n, num_heads, sketch[0].shape[0], width, table.shape[1], *_kind_and_type(sketch),
        statistic == "mass", bound, rows.data_ptr(), address(residual),
        *row_fields(table), *row_fields(lens), *_sketch_fields(sketch),
        logit.data_ptr(), score.data_ptr(), k, chosen.data_ptr(),
    ]
    call("score_pages", fields, softmax_scale)
    return logit, score, chosen


def _kind_and_type(sketch: Any) -> tuple[int, int]:
    if hasattr(sketch, "codes"):
        return LOW_RANK, 0
    return MEAN if hasattr(sketch, "mean") else BOX, TYPES[sketch[0].dtype]


def _sketch_fields(sketch: Any) -> list[int]:
    """Means or boxes, codes, and norms: a sketch has the first, or the others."""
    if not hasattr(sketch, "codes"):
        first, second = sketch if len(sketch) == 2 else (*sketch, None)
        return [*pool_fields(first), *pool_fields(second), *NO_SIDE, *pool_fields(None)]
    codes = side_fields(sketch.codes, sketch.scale, sketch.zero, sketch.page_size, 1)
    return [*pool_fields(None), *pool_fields(None), *codes, *pool_fields(sketch.residual)]
