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

# Before the names of what is told apart by expert: a model has many, and few methods ask.
EXPERTS = "experts."


def moment_tensors(moments: KVMoments) -> dict[str, Tensor]:
    """Of one layer, by the names that `read_moments` knows."""
    return {
        f"{side}.{name}": part
        for side, own in moments._asdict().items()
        for name, part in own._replace(count=torch.tensor(own.count))._asdict().items()
        if part is not None
    }


def read_moments(path: Path, number: int, fitted: Mapping[str, Tensor], kv: KVShape) -> KVMoments:
    """The moments of layer `number`.

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
            name.removeprefix(prefix): fitted[name] for name in fitted if name.startswith(prefix)
        }
        shape = tuple(parts["mean"].shape) if "mean" in parts else None
        if shape != (kv.num_groups, width):
            raise ValueError(
                f"calibration {path}: layer {number} has {kv.num_groups} KV heads of {side} of "
                f"width {width}, and the file has {shape}: {REMEDY}"
            )
        found.append(Moments(**parts | {"count": int(fitted[f"{prefix}count"])}))
    return KVMoments(*found)


def read_shard_moments(
    path: Path, number: int, fitted: Mapping[str, Tensor], whole: KVMoments, num_shards: int
) -> tuple[KVMoments, ...]:
    """The moments of the tokens of each expert shard of layer `number`.

    A shard that had fewer tokens than a basis can have directions takes those of all experts.

    Args:
        path: of the file.
        fitted: what it has of the layer.
        whole: of all experts.
        num_shards: expert shards; expert e belongs to shard e mod num_shards.

    Raises:
        ValueError: the file does not tell experts apart.
    """
    if f"{EXPERTS}keys.mean" not in fitted:
        raise ValueError(
            f"calibration {path}: layer {number} asks for a basis an expert (codec.transform, "
            "per_expert), and the file has moments of all experts together: make it with "
            "launch/calibrate.py --per-expert, or leave out per_expert"
        )
    sides = (
        _of_shards(fitted, f"{EXPERTS}{side}.", own, num_shards)
        for side, own in whole._asdict().items()
    )
    return tuple(KVMoments(*pair) for pair in zip(*sides))


def _of_shards(
    fitted: Mapping[str, Tensor], prefix: str, whole: Moments, num_shards: int
) -> list[Moments]:
    means, scatters, counts = (
        fitted[f"{prefix}{name}"].double() for name in ("mean", "scatter", "count")
    )
    found = []
    for shard in range(num_shards):
        mean, scatter, count = (x[shard::num_shards] for x in (means, scatters, counts))
        total = count.sum()
        if total < whole.mean.shape[1]:
            found.append(whole)
            continue
        middle = torch.einsum("e,egw->gw", count, mean) / total
        apart = mean - middle
        between = torch.einsum("e,egw,egv->gwv", count, apart, apart)
        found.append(Moments(
            middle.float(), (scatter.sum(dim=0) + between).float(), int(total), whole.metric
        ))
    return found
