"""Truncated singular value decomposition (paper, Table 2, C_SVD)."""

from typing import Literal

from pikv_megatron.codec.transform.fits import leading, orthogonal
from pikv_megatron.codec.transform.linear import LinearOptions


class SVDOptions(LinearOptions):
    """Keys and values in their prompt's leading principal directions.

    The squared error is the sum of the squared singular values beyond the rank, of keys (values)
    less their mean.
    """

    name: Literal["svd"] = "svd"

    def fit_keys(self, moments, rank):
        return orthogonal(moments.mean, leading(moments.scatter, rank))
