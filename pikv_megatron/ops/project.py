"""The basis of a linear codec, applied to queries or keys head by head."""

import torch

from pikv_megatron.ops.backend import kernel_op


def project(
    x: torch.Tensor, basis: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each head by the basis of its group: y = x B + b.

    The product is summed in float32 on a GPU, as the CPU's matrix product does otherwise. Memory
    of the result is laid out as that of x: keys that are a transposed view of [ng, t, w_in] give a
    transposed view of [ng, t, w_out], and are not copied.

    Args:
        x: [..., heads, w_in], heads = g * ng; head h belongs to group h // g. Leading dimensions
            that cannot be viewed as one are copied.
        basis: [ng, w_in, w_out], x's dtype.
        bias: [ng, w_out], or None.

    Returns:
        [..., heads, w_out], x's dtype.

    Example:
        Four heads, two groups, widths 1, bases 2 and 3, x = 1, 1, 1, 1: y = 2, 2, 3, 3.
    """
    kernel = kernel_op("project", x)
    if kernel is not None:
        return kernel(x, basis, bias)
    num_groups, w_in, w_out = basis.shape
    rows = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
    grouped = rows.unflatten(1, (num_groups, -1)).transpose(0, 1)  # [ng, rows, g, w_in]
    group = grouped.shape[2]
    flat = grouped.reshape(num_groups, len(rows) * group, w_in)
    if bias is None:
        out = torch.bmm(flat, basis)
    else:
        out = torch.baddbmm(bias.unsqueeze(1), flat, basis)
    out = out.unflatten(1, (rows.shape[0], group)).transpose(0, 1)
    return out.flatten(1, 2).view(*x.shape[:-1], w_out)
