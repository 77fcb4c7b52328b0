"""How a model's makers want tokens to be chosen: `generation_config.json`."""

from pathlib import Path
from typing import Any

from pikv_megatron.checkpoint.json_file import read_json

# What transformers assumes where the file asks for sampling and leaves these out.
DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Fields of `SamplingParams` that the file decides; none without a file.

    Without `do_sample` tokens are not drawn, whatever temperature the file names.

    Raises:
        ValueError: the file is broken.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    chosen: dict[str, Any] = {}
    if config.get("repetition_penalty") is not None:
        chosen["repetition_penalty"] = config["repetition_penalty"]
    if config.get("do_sample"):
        for field, default in DRAWING.items():
            chosen[field] = default if config.get(field) is None else config[field]
    return chosen
