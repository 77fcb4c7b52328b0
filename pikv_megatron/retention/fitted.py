"""What policies read of a calibration, in the layer's own terms."""

from typing import Mapping

from torch import Tensor

from pikv_megatron.ops.rotation import unrotated


class Rotary:
    """How a calibrated layer rotates its keys.

    Args:
        fitted: the section `rotary`.
    """

    def __init__(self, fitted: Mapping[str, Tensor]):
        self.angles = fitted["angles"]
        self.is_interleaved = bool(fitted["interleaved"])

    def turned_back(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [ng, c, S, w] of positions [c, S] as they were before RoPE, float32."""
        by_token = keys.float().flatten(1, 2).transpose(0, 1)
        turned = unrotated(by_token, positions.flatten(), self.angles, self.is_interleaved)
        return turned.transpose(0, 1).view(keys.shape)
