"""Reads slices of tensors from a Hugging Face directory, however they are stored there."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pikv_megatron.checkpoint.json_file import read_json
from pikv_megatron.checkpoint.name_table import Source
from pikv_megatron.checkpoint.quantized import (
    BLOCKS,
    MXFP4_BLOCK,
    SCALE,
    SCALES,
    block_scaled,
    mxfp4,
    scale_shape,
    weight_block_size,
)
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
            bases = {name.removesuffix(suffix) for suffix in ("", SCALE, BLOCKS, SCALES)}
            is_known = not bases.isdisjoint(known)
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
        path = self.files.file_of[name if self.has(name) else name + BLOCKS]
        return f"{path}: tensor {name}"

    def read(
        self, source: Source, axis: int | None = None, start: int = 0, stop: int = 0
    ) -> torch.Tensor:
        """Read `source`, whole or from `start` to `stop` along `axis`."""
        index = [slice(0, size) for size in source.shape]
        if axis is not None:
            index[axis] = slice(start, stop)
        name, expert = self._spelling(source), ()
        if name == source.other_name and source.expert is not None:
            rows, expert = index[0], (source.expert,)
            first, step = source.first_row, source.row_step
            index[0] = slice(first + rows.start * step, first + (rows.stop - 1) * step + 1)
        if not self.has(name):
            values = self._read_mxfp4(name, expert, index)
        elif source.is_transposed:
            values = self.files.slice(name)[(*expert, *reversed(index))].T
        else:
            values = self._read_plain(name, expert, index)
        return values if source.row_step == 1 else values[:: source.row_step]

    def _read_plain(self, name: str, expert: tuple[int, ...], index: list[slice]) -> torch.Tensor:
        values = self.files.slice(name)[(*expert, *index)]
        if values.dtype != torch.float8_e4m3fn:
            return values
        scale = self.files.slice(name + SCALE)
        scale = scale[(*expert, *(slice(None) for _ in index))]
        return block_scaled(values, scale, self._block, tuple(part.start for part in index))

    def _read_mxfp4(self, name: str, expert: tuple[int, ...], index: list[slice]) -> torch.Tensor:
        """Rows in blocks of columns; they are not transposed there."""
        rows = (*expert, index[0])
        blocks, scales = (self.files.slice(name + kind)[rows] for kind in (BLOCKS, SCALES))
        return mxfp4(blocks, scales)[:, index[1]]

    def _check_source(self, source: Source) -> None:
        name = self._spelling(source)
        is_other = name == source.other_name
        expected = source.other_shape if is_other else source.shape
        if not self.has(name):
            self._check_mxfp4(name, expected)
            return
        self._check_shape(name, expected)
        kind = self.files.slice(name).get_dtype()
        if kind == FLOAT8 and self._block is not None and len(expected) > 1:
            self._check_shape(name + SCALE, scale_shape(expected, self._block))
        elif kind not in FLOATS:
            hint = ", and config.json has no weight_block_size" if kind == FLOAT8 else ""
            path = self.files.file_of[name]
            raise ValueError(f"{path}: tensor {name} has type {kind}, not a float{hint}")

    def _check_mxfp4(self, name: str, transposed: tuple[int, ...]) -> None:
        experts, columns, rows = transposed
        scales = experts, rows, columns // MXFP4_BLOCK
        self._check_shape(name + SCALES, scales)
        self._check_shape(name + BLOCKS, (*scales, MXFP4_BLOCK // 2))
        for kind in (SCALES, BLOCKS):
            found = self.files.slice(name + kind).get_dtype()
            if found != "U8":
                path = self.files.file_of[name + kind]
                raise ValueError(f"{path}: tensor {name + kind} has type {found}, not U8")

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
            if name is not None and (self.has(name) or self.has(name + BLOCKS)):
                return name
        raise ValueError(f"{self.files.listing}: tensor {source.name} is missing")
