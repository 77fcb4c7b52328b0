"""The file of moments that transforms are fitted to: what `launch/calibrate.py` writes.

It knows nothing of ranks and methods, so one file serves every transform.
"""

from pathlib import Path
from typing import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.types import KVShape


def save_moments(path: Path, layers: Mapping[int, KVMoments]) -> None:
    """Write the moments of layers by their numbers, from 0."""
    tensors = {}
    for number, layer in layers.items():
        for side, moments in layer._asdict().items():
            parts = moments._replace(count=torch.tensor(moments.count))._asdict()
            tensors |= {
                f"{number}.{side}.{name}": part.contiguous() for name, part in parts.items()
                if part is not None
            }
    save_file(tensors, path)


def load_moments(path: Path, shapes: Sequence[KVShape | None]) -> list[KVMoments | None]:
    """Read the moments of all layers, on their devices.

    Args:
        shapes: of the layers; None: the layer has no pages, and needs no moments.

    Raises:
        ValueError: there is no such file, or it is of another model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"calibration {path}: cannot read it: {error}") from error
    return [
        None if kv is None else _layer(path, tensors, number, kv)
        for number, kv in enumerate(shapes)
    ]


def _layer(path: Path, tensors: dict, number: int, kv: KVShape) -> KVMoments:
    found = []
    for side, width in (("keys", kv.key_width), ("values", kv.value_width)):
        prefix = f"{number}.{side}."
        parts = {
            name.removeprefix(prefix): part.to(kv.device) for name, part in tensors.items()
            if name.startswith(prefix)
        }
        shape = tuple(parts["mean"].shape) if "mean" in parts else None
        if shape != (kv.num_groups, width):
            raise ValueError(
                f"calibration {path}: layer {number} has {kv.num_groups} KV heads of {side} of "
                f"width {width}, and the file has {shape}: make it with launch/calibrate.py for "
                "this model"
            )
        found.append(Moments(**parts | {"count": int(parts["count"])}))
    return KVMoments(*found)
