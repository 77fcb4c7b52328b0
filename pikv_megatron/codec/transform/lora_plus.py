"""Affine low-rank adapters (paper, Table 2, C_Lo+)."""

from typing import ClassVar, Literal

from pikv_megatron.codec.transform.fits import leading, orthogonal
from pikv_megatron.codec.transform.linear import LinearOptions


class LoRAPlusOptions(LinearOptions):
    """Two factors W_d W_u and a bias b, the same for all sequences.

    The squared error is that of K - (K W_d W_u + b), b = mean (1 - W_d W_u): no other bias and
    factors of the rank leave less on what they were fitted to.
    """

    name: Literal["lora++"] = "lora++"

    is_shared: ClassVar[bool] = True

    def fit_keys(self, moments, rank):
        return orthogonal(moments.mean, leading(moments.scatter, rank))
