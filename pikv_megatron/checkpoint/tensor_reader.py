"""Reads slices of tensors from a Hugging Face directory, however they are stored there."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pikv_megatron.checkpoint.json_file import read_json
from pikv_megatron.checkpoint.name_table import Source
from pikv_megatron.checkpoint.quantized import SCALE, block_scaled, scale_shape, weight_block_size
from pikv_megatron.checkpoint.tensor_files import TensorFiles

FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = "F8_E4M3"


class TensorReader:
    """The tensors of a directory: sources are read in floating types, dequantised where needed.

    Raises:
        ValueError: the directory holds no safetensors, a file is missing, cut or broken, or its
            weights are quantised in a way that is not read.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.files = TensorFiles(self.directory)
        config = self.directory / "config.json"
        try:
            self._block = weight_block_size(read_json(config))
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error

    def check(self, sources: list[Source], is_left_out: Callable[[str], bool]) -> None:
        """Check that every source is there in its shape, and nothing that no source names but what
        is left out by its name.

        Raises:
            ValueError: naming the file and the tensor.
        """
        known = {name for s in sources for name in (s.name, s.other_name)}
        for name, path in self.files.file_of.items():
            is_known = name in known or name.removesuffix(SCALE) in known
            if not is_known and not is_left_out(name):
                raise ValueError(f"{path}: tensor {name} belongs to no part of this architecture")
        self.check_sources(sources)

    def check_sources(self, sources: Iterable[Source]) -> None:
        """Check that every source is there in its shape.

        Raises:
            ValueError: naming the file and the tensor.
        """
        for source in sources:
            self._check_source(source)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.files.file_of

    def place(self, source: Source) -> str:
        """File and tensor of a source, for messages.

        Raises:
            ValueError: it is missing.
        """
        name = self._spelling(source)
        return f"{self.files.file_of[name]}: tensor {name}"

    def read(
        self, source: Source, axis: int | None = None, start: int = 0, stop: int = 0
    ) -> torch.Tensor:
        """Read `source`, whole or from `start` to `stop` along `axis`."""
        index = [slice(0, size) for size in source.shape]
        if axis is not None:
            index[axis] = slice(start, stop)
        name, expert = self._spelling(source), ()
        if name != source.name and source.expert is not None:
            rows, expert = index[0], (source.expert,)
            index[0] = slice(source.first_row + rows.start, source.first_row + rows.stop)
        values = self.files.slice(name)[(*expert, *index)]
        if values.dtype != torch.float8_e4m3fn:
            return values
        scale = self.files.slice(name + SCALE)
        scale = scale[(*expert, *(slice(None) for _ in index))]
        return block_scaled(values, scale, self._block, tuple(part.start for part in index))

    def _check_source(self, source: Source) -> None:
        name = self._spelling(source)
        expected = source.shape if name == source.name else source.other_shape
        self._check_shape(name, expected)
        kind = self.files.slice(name).get_dtype()
        if kind == FLOAT8 and self._block is not None and len(expected) > 1:
            self._check_shape(name + SCALE, scale_shape(expected, self._block))
        elif kind not in FLOATS:
            hint = ", and config.json has no weight_block_size" if kind == FLOAT8 else ""
            path = self.files.file_of[name]
            raise ValueError(f"{path}: tensor {name} has type {kind}, not a float{hint}")

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        if not self.has(name):
            raise ValueError(f"{self.files.listing}: tensor {name} is missing")
        shape = tuple(self.files.slice(name).get_shape())
        if shape != expected:
            raise ValueError(
                f"{self.files.file_of[name]}: tensor {name} has shape {shape}, config.json asks "
                f"for {expected}"
            )

    def _spelling(self, source: Source) -> str:
        for name in (source.name, source.other_name):
            if name is not None and self.has(name):
                return name
        raise ValueError(f"{self.files.listing}: tensor {source.name} is missing")
