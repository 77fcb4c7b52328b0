"""Presets, imported as `pikv_megatron.presets`: the YAML files beside this one, and in `presets`
those that are recommended."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


def preset_files() -> dict[str, Path]:
    """Every preset's file by its name."""
    return {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}


def preset_values(name: Any) -> dict[str, Any]:
    """The keys of a preset, which can be based on another one in its turn.

    Raises:
        ValueError: there is none of that name.
    """
    files = preset_files()
    if name not in files:
        raise ValueError(f"preset {name!r} is unknown: the presets are {', '.join(files)}")
    values = yaml.safe_load(files[name].read_text())
    base = preset_values(values.pop("preset")) if "preset" in values else {}
    return {**base, **values}
