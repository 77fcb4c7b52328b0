"""Presets, imported as `pikv_megatron.presets`: the YAML files beside this one."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """All of them."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset_values(name: Any) -> dict[str, Any]:
    """The keys of a preset, which can be based on another one in its turn.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in preset_names():
        raise ValueError(
            f"preset {name!r} is unknown: the presets are {', '.join(preset_names())}"
        )
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    base = preset_values(values.pop("preset")) if "preset" in values else {}
    return {**base, **values}
