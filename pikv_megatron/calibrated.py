"""The file that `launch/calibrate.py` writes: what was fitted to each layer of a model, by name.

A section of it belongs to whatever registered for fitting (`calibration/registry.py`): `keys.mean`,
`queries.covariance`. A method reads its own section, and knows by its name what is missing.
"""

import json
import os
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

REMEDY = "make it with launch/calibrate.py for this model"
# Of layers, by their numbers from 0; each by name.
Layers = Mapping[int, Mapping[str, Tensor]]


class Calibrated(NamedTuple):
    """What a file holds.

    Attributes:
        manifest: of which model and which text it was made, how keys are rotated, the settings.
        layers: tensors by layer and name.
    """

    manifest: dict[str, Any]
    layers: dict[int, dict[str, Tensor]]


def save_calibrated(path: Path, manifest: Mapping[str, Any], layers: Layers) -> None:
    """Write a file, whole or not at all."""
    tensors = {
        f"{number}.{name}": part.contiguous() for number, layer in layers.items()
        for name, part in layer.items()
    }
    unfinished = path.with_name(f"{path.name}.new")
    save_file(tensors, unfinished, {"manifest": json.dumps(dict(manifest), sort_keys=True)})
    os.replace(unfinished, path)


def load_calibrated(path: Path) -> Calibrated:
    """Read a file.

    Raises:
        ValueError: there is none, or it is not of `save_calibrated`.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            manifest = json.loads((file.metadata() or {})["manifest"])
            for key in file.keys():
                number, name = key.split(".", 1)
                layers.setdefault(int(number), {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"calibration {path}: cannot read it: {error}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"calibration {path}: it has no manifest: {REMEDY}") from error
    return Calibrated(manifest, layers)


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
    found = {key.removeprefix(start): x for key, x in fitted.items() if key.startswith(start)}
    if not found:
        raise ValueError(
            f"{asker} needs the section {name!r} of a calibration, and this file has none for a "
            "layer: those with latent attention, or without experts, may have none, and take "
            "another method; else make the file anew with launch/calibrate.py"
        )
    return found
