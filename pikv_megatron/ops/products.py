"""Matrix products of listed pages, into memory that is reused.

Legend: n sequences, ng KV heads; x is what a product sums over.
"""

import torch

from pikv_megatron.ops.workspace import scratch


def multiply(
    a: torch.Tensor, operands: list[torch.Tensor], out: torch.Tensor, adds: bool = False
) -> None:
    """Matrix products in the operands' type, into or onto `out`, float32.

    Args:
        a: [ng * n, rows, x].
        operands: one [ng * n, x, y], or one [n, x, y] for each KV head.
        out: [ng * n, rows, y].
    """
    if a.dtype != operands[0].dtype:
        a = scratch("narrow weights", a.shape, operands[0].dtype, a.device).copy_(a)
    if len(operands) == 1:
        return _multiply_flat(a, operands[0], out, adds)
    count = len(operands)
    for left, right, product in zip(a.chunk(count), operands, out.chunk(count)):
        _multiply_flat(left, right, product, adds)


def _multiply_flat(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, adds: bool) -> None:
    if b.dtype == out.dtype and out.is_contiguous():
        torch.baddbmm(out, a, b, beta=1 if adds else 0, out=out)
        return
    # Torch would take a product into strided memory matrix by matrix.
    product = torch.bmm(a, b, out=scratch("product", out.shape, b.dtype, b.device))
    out.add_(product) if adds else out.copy_(product)
