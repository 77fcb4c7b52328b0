"""Low-rank adapters (paper, Table 2, C_Lo)."""

from typing import ClassVar, Literal

import torch

from pikv_megatron.codec.transform.fits import leading, orthogonal
from pikv_megatron.codec.transform.linear import LinearOptions


class LoRAOptions(LinearOptions):
    """Two factors W_d W_u, the same for all sequences, without a bias.

    The squared error on what they were fitted to is the sum of the squared singular values beyond
    the rank.
    """

    name: Literal["lora"] = "lora"

    is_shared: ClassVar[bool] = True

    def fit_keys(self, moments, rank):
        return orthogonal(torch.zeros_like(moments.mean), leading(moments.second, rank))
