"""What a policy reads of a calibration, in the layer's own terms."""

from typing import Mapping

from torch import Tensor

from pikv_megatron.ops.rotation import unrotated


def section(fitted: Mapping[str, Tensor] | None, policy: str, name: str) -> dict[str, Tensor]:
    """The tensors of a layer's calibration that begin with `name`, without that.

    Raises:
        ValueError: there is no calibration, or it has none of them.
    """
    if fitted is None:
        raise ValueError(
            f"retention {policy} needs a calibration: set calibration to a file of "
            "launch/calibrate.py"
        )
    start = f"{name}."
    found = {key.removeprefix(start): x for key, x in fitted.items() if key.startswith(start)}
    if not found:
        raise ValueError(
            f"retention {policy} needs the section {name!r} of a calibration, and this file has "
            "none for a layer: latent attention has none, name another policy; or make the file "
            "anew with launch/calibrate.py"
        )
    return found


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
