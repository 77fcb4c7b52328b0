"""Factors of linear transforms from moments.

Legend: ng KV heads, w width, r rank.
"""

import torch
from torch import Tensor

from pikv_megatron.codec.transform.linear import Factors
from pikv_megatron.codec.transform.moments import Moments


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., w], rising, and eigenvectors [..., w, w] of symmetric matrices, float32.

    In float64, and kept off zero by what float32 does not resolve: LAPACK does not converge on some
    matrices of numbers near the smallest.
    """
    matrix = matrix.double()
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(
        matrix + torch.diag_embed((1e-9 * size).unsqueeze(-1).expand(matrix.shape[:-1]))
    )
    return values.float(), vectors.float()


def leading(scatter: Tensor, rank: int) -> Tensor:
    """Directions [ng, w, r] in which a scatter [ng, w, w] is largest, the largest first.

    No others leave less of it (Eckart and Young): they leave the sum of its eigenvalues beyond the
    r-th, which are the squared singular values of what it is the scatter of.
    """
    return eigh(scatter)[1][:, :, -rank:].flip(2)


def orthogonal(shift: Tensor, basis: Tensor) -> Factors:
    """Factors of a projection onto orthonormal directions [ng, w, r]."""
    return Factors(shift, basis)


def channels(moments: Moments, kept: Tensor) -> Factors:
    """Factors that keep the channels `kept` [ng, r] and drop the others."""
    width = moments.mean.shape[1]
    return orthogonal(
        torch.zeros_like(moments.mean), torch.eye(width, device=kept.device)[:, kept].movedim(0, 1)
    )
