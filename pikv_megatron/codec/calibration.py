"""The moments of a calibration file, which transforms are fitted to.

They know nothing of ranks and methods, so one file serves every transform.
"""

from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor

from pikv_megatron.calibrated import REMEDY
from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.types import KVShape


def moment_tensors(moments: KVMoments) -> dict[str, Tensor]:
    """Of one layer, by the names that `read_moments` knows."""
    return {
        f"{side}.{name}": part
        for side, own in moments._asdict().items()
        for name, part in own._replace(count=torch.tensor(own.count))._asdict().items()
        if part is not None
    }


def read_moments(path: Path, number: int, fitted: Mapping[str, Tensor], kv: KVShape) -> KVMoments:
    """The moments of layer `number`, on its device.

    Args:
        path: of the file.
        fitted: what it has of the layer.

    Raises:
        ValueError: the file is of another model.
    """
    found = []
    for side, width in (("keys", kv.key_width), ("values", kv.value_width)):
        prefix = f"{side}."
        parts = {
            name.removeprefix(prefix): part.to(kv.device) for name, part in fitted.items()
            if name.startswith(prefix)
        }
        shape = tuple(parts["mean"].shape) if "mean" in parts else None
        if shape != (kv.num_groups, width):
            raise ValueError(
                f"calibration {path}: layer {number} has {kv.num_groups} KV heads of {side} of "
                f"width {width}, and the file has {shape}: {REMEDY}"
            )
        found.append(Moments(**parts | {"count": int(fitted[f"{prefix}count"])}))
    return KVMoments(*found)
