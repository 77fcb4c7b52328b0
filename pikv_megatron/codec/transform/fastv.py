"""Crop (paper, Table 2, C_F)."""

from typing import Literal

import torch

from pikv_megatron.codec.transform.fits import channels
from pikv_megatron.codec.transform.linear import LinearOptions
from pikv_megatron.codec.transform.moments import plane_order


class FastVOptions(LinearOptions):
    """The first channels of values, and the slowest rotary planes of keys: nothing is learned.

    The squared error is that of the channels that are cropped.
    """

    name: Literal["fastv"] = "fastv"

    def fit_keys(self, moments, rank):
        slowest = plane_order(moments.mean.shape[1]).flip(0)[:rank]
        return channels(moments, slowest.expand(len(moments.mean), -1).to(moments.mean.device))

    def fit_values(self, moments, rank):
        first = torch.arange(rank, device=moments.mean.device)
        return channels(moments, first.expand(len(moments.mean), -1))
