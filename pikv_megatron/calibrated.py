"""The file that `launch/calibrate.py` writes: what was fitted to each layer of a model, by name.
What routers learn of a model while they run is written in the same way.

A section of it belongs to whatever registered for fitting (`calibration/registry.py`): `keys.mean`,
`queries.covariance`. A method reads its own section, and knows by its name what is missing.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

REMEDY = "make it with launch/calibrate.py for this model"
REMEDIES = {"calibration": REMEDY, "learned": "name another file, or none that is there"}
# Of layers, by their numbers from 0; each by name.
Layers = Mapping[int, Mapping[str, Tensor]]


class FittedLayer(Mapping[str, Tensor]):
    """What a file has of a layer, by name. A tensor is read when it is asked for: a file has many,
    and a method asks for few.

    Args:
        file: as safetensors opened it.
        keys: the tensors' names there, by their names here.
        device: that they are read to.
    """

    def __init__(self, file: Any, keys: Mapping[str, str], device: torch.device | None = None):
        self._file, self._keys, self._device = file, keys, device

    def to(self, device: torch.device) -> "FittedLayer":
        return FittedLayer(self._file, self._keys, device)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(self._keys[name]).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Calibrated(NamedTuple):
    """What a file holds.

    Attributes:
        path: of the file.
        key: of the configuration, that names it.
        manifest: of which model and which text it was made, how keys are rotated, the settings.
        layers: tensors by layer and name.
    """

    path: Path
    key: str
    manifest: dict[str, Any]
    layers: dict[int, FittedLayer]


def save_calibrated(
    path: Path, manifest: Mapping[str, Any], layers: Layers, is_private: bool = False
) -> None:
    """Write a file, whole or not at all; a private one is its owner's to read."""
    tensors = {
        f"{number}.{name}": part.contiguous() for number, layer in layers.items()
        for name, part in layer.items()
    }
    unfinished = path.with_name(f"{path.name}.new")
    if is_private:
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
    save_file(tensors, unfinished, {"manifest": json.dumps(dict(manifest), sort_keys=True)})
    os.replace(unfinished, path)


def load_calibrated(path: Path, key: str = "calibration") -> Calibrated:
    """Open a file, and read its manifest.

    Raises:
        ValueError: there is none, or it is not of `save_calibrated`.
    """
    keys: dict[int, dict[str, str]] = {}
    try:
        file = safe_open(path, "pt")
        manifest = json.loads((file.metadata() or {})["manifest"])
        for stored in file.keys():
            number, name = stored.split(".", 1)
            keys.setdefault(int(number), {})[name] = stored
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{key} {path}: cannot read it: {error}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{key} {path}: it has no manifest: {REMEDIES[key]}") from error
    layers = {number: FittedLayer(file, own) for number, own in keys.items()}
    return Calibrated(path, key, manifest, layers)


def section(fitted: Mapping[str, Tensor] | None, asker: str, name: str) -> dict[str, Tensor]:
    """The tensors of a layer's calibration that begin with `name`, without that.

    Args:
        fitted: the layer's, by name; None: there is no calibration.
        asker: who needs them, as a configuration names it.

    Raises:
        ValueError: there is no calibration, or it has none of them.
    """
    if fitted is None:
        raise ValueError(
            f"{asker} needs a calibration: set calibration to a file of launch/calibrate.py"
        )
    start = f"{name}."
    found = {
        key.removeprefix(start): fitted[key] for key in fitted if key.startswith(start)
    }
    if not found:
        raise ValueError(
            f"{asker} needs the section {name!r} of a calibration, and this file has none for a "
            "layer: those with latent attention, or without experts, may have none, and take "
            "another method; else make the file anew with launch/calibrate.py"
        )
    return found
