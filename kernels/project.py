"""The basis of a linear codec, applied to queries or keys head by head.

Legend: ng bases, heads = g * ng, rows: everything before the heads. A tensor reaches a kernel as a
pair: its pointer and its strides.
"""

import torch
import triton
import triton.language as tl

BLOCK_N = 64
BLOCK_K = 32


@triton.jit
def _project(
    x, basis, bias, out, num_rows, group, w_in, w_out,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program (i, b, j): block i of the rows and heads of basis b, block j of the columns.

    Example:
        Two rows of 4 heads, 2 bases: basis 1 multiplies (row, head) = (0, 2), (0, 3), (1, 2),
        (1, 3), one tile of 4 rows padded to 16.
    """
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, head = (line // group).to(tl.int64), which * group + line % group
    is_line, is_column = row < num_rows, column < w_out
    lines = x[0] + row * x[1][0] + head * x[1][1]
    factor = basis[0] + which.to(tl.int64) * basis[1][0]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, w_in, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        is_inner = inner < w_in
        a = tl.load(lines[:, None] + inner[None, :] * x[1][2],
                    mask=is_line[:, None] & is_inner[None, :], other=0.0)
        b = tl.load(factor + inner[:, None] * basis[1][1] + column[None, :] * basis[1][2],
                    mask=is_inner[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    if bias is not None:
        shift = tl.load(bias[0] + which * bias[1][0] + column * bias[1][1], mask=is_column)
        total += shift.to(tl.float32)[None, :]
    places = out[0] + row * out[1][0] + head * out[1][1]
    tl.store(places[:, None] + column[None, :] * out[1][2], total.to(out[0].dtype.element_ty),
             mask=is_line[:, None] & is_column[None, :])


def project(
    x: torch.Tensor, basis: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `pikv_megatron.ops.project.project`."""
    num_groups, w_in, w_out = basis.shape
    rows = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
    num_rows, heads = rows.shape[:2]
    out = _empty_like(rows, w_out)
    group = heads // num_groups
    if out.numel():
        block_m = max(16, min(64, triton.next_power_of_2(num_rows * group)))
        # TF32 holds every bfloat16 and float16 number, so their products are exact.
        precision = "ieee" if x.dtype == torch.float32 else "tf32"
        grid = (triton.cdiv(num_rows * group, block_m), num_groups, triton.cdiv(w_out, BLOCK_N))
        _project[grid](
            (rows, rows.stride()), (basis, basis.stride()),
            None if bias is None else (bias, bias.stride()), (out, out.stride()),
            num_rows, group, w_in, w_out, PRECISION=precision, BLOCK_M=block_m,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )
    return out.view(*x.shape[:-1], w_out)


def _empty_like(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, heads, width], heads outermost in memory where they are in `rows`."""
    num_rows, heads = rows.shape[:2]
    if rows.stride(1) > rows.stride(0):
        return rows.new_empty(heads, num_rows, width).transpose(0, 1)
    return rows.new_empty(num_rows, heads, width)
