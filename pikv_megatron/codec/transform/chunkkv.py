"""Block principal components (paper, Table 2, C_Ch).

Legend: ng KV heads, w width, r rank, b blocks of channels.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.codec.transform.fits import eigh, orthogonal
from pikv_megatron.codec.transform.linear import Factors, LinearOptions
from pikv_megatron.codec.transform.moments import Moments, plane_order


class ChunkKVOptions(LinearOptions):
    """Principal directions of blocks of channels, the strongest of all blocks.

    A key's blocks are of whole rotary planes, since what RoPE mixes further apart it mixes
    otherwise at every position. The squared error is the sum over blocks of the squared singular
    values that are dropped.
    """

    name: Literal["chunkkv"] = "chunkkv"
    block: int = Field(8, ge=2, description="channels of a block, at most")

    def fit_keys(self, moments, rank):
        return self._fit(moments, rank, plane_order(moments.mean.shape[1]))

    def fit_values(self, moments, rank):
        return self._fit(moments, rank, torch.arange(moments.mean.shape[1]))

    def _fit(self, moments: Moments, rank: int, order: torch.Tensor) -> Factors:
        order = order.to(moments.mean.device)
        parts = []
        for block in order.split(self.block):
            values, vectors = eigh(moments.scatter[:, block][:, :, block])
            basis = vectors.new_zeros(len(values), len(order), len(block))
            basis[:, block] = vectors
            parts.append((values, basis))
        energy, basis = (torch.cat(part, dim=-1) for part in zip(*parts))
        best = energy.topk(rank, dim=1).indices.unsqueeze(1).expand(-1, len(order), -1)
        return orthogonal(moments.mean, basis.gather(2, best))
