"""Structured pruning (paper, Table 2, C_Pr)."""

from typing import Literal

from pikv_megatron.codec.transform.fits import channels
from pikv_megatron.codec.transform.linear import LinearOptions
from pikv_megatron.codec.transform.moments import plane_order


class PruningOptions(LinearOptions):
    """The rotary planes of keys, and the channels of values, that have the most energy.

    RoPE turns a key within its planes, so a plane's energy is the same at every position: what was
    chosen by the prompt stays right. The squared error is the energy of the channels Z that are
    dropped, sum over j in Z of K_j^2.
    """

    name: Literal["pruning"] = "pruning"

    def fit_keys(self, moments, rank):
        energy = moments.second.diagonal(dim1=1, dim2=2)
        if energy.shape[1] % 2 or rank % 2:
            return channels(moments, energy.topk(rank, dim=1).indices)
        planes = plane_order(energy.shape[1]).to(energy.device).view(-1, 2)
        best = energy[:, planes].sum(2).topk(rank // 2, dim=1).indices
        return channels(moments, planes[best].flatten(1))

    def fit_values(self, moments, rank):
        energy = moments.second.diagonal(dim1=1, dim2=2)
        return channels(moments, energy.topk(rank, dim=1).indices)
