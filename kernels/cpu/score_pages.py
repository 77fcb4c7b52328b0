"""How much each page matters to a query, from sketches: `score_pages.cpp`."""

from typing import Any

import torch

from pikv_kernels.cpu.fields import BYTE_TYPES, TYPES, address, pool_fields, row_fields
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
    kind, type_code, page_size, stored_rows, pools = _sketch_fields(sketch)
    fields = [
        n, num_heads, sketch[0].shape[0], width, table.shape[1], kind, type_code, page_size,
        stored_rows, statistic == "mass", bound, rows.data_ptr(), address(residual),
        *row_fields(table), *row_fields(lens),
    ]
    for pool in pools:
        fields += pool_fields(pool)
    fields += [logit.data_ptr(), score.data_ptr(), k, chosen.data_ptr()]
    call("score_pages", fields, softmax_scale)
    return logit, score, chosen


def _sketch_fields(sketch: Any) -> tuple[int, int, int, int, list[torch.Tensor | None]]:
    if hasattr(sketch, "mean"):
        return MEAN, TYPES[sketch.mean.dtype], 1, 1, [sketch.mean, None, None, None]
    if hasattr(sketch, "low"):
        return BOX, TYPES[sketch.low.dtype], 1, 1, [sketch.low, sketch.high, None, None]
    stored_rows = sketch.codes.shape[2]
    type_code = BYTE_TYPES[8 * stored_rows // sketch.page_size]
    pools = [sketch.codes, sketch.scale, sketch.zero, sketch.residual]
    return LOW_RANK, type_code, sketch.page_size, stored_rows, pools
