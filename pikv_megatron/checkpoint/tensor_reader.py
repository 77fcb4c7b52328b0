"""Reads slices of tensors from the safetensors files of a Hugging Face directory."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pikv_megatron.checkpoint.json_file import read_json
from pikv_megatron.checkpoint.name_table import Source

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorReader:
    """The tensors of a directory; files are mapped, and only the slices asked for are read.

    Raises:
        ValueError: the directory holds no safetensors, or a file is missing, cut or broken.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[Path, safe_open] = {}
        self.file_of = self._find_tensors()

    def check(self, sources: list[Source], ignored_suffixes: tuple[str, ...] = ()) -> None:
        """Check that every source is there in its shape, and nothing that no source names.

        Raises:
            ValueError: naming the file and the tensor.
        """
        known = {name for s in sources for name in (s.name, s.other_name)}
        for name, path in self.file_of.items():
            if name not in known and not name.endswith(ignored_suffixes):
                raise ValueError(f"{path}: tensor {name} belongs to no part of this architecture")
        self.check_sources(sources)

    def check_sources(self, sources: Iterable[Source]) -> None:
        """Check that every source is there in its shape.

        Raises:
            ValueError: naming the file and the tensor.
        """
        for source in sources:
            self._check_source(source)

    def read(
        self, source: Source, axis: int | None = None, start: int = 0, stop: int = 0
    ) -> torch.Tensor:
        """Read `source`, whole or from `start` to `stop` along `axis`."""
        index = [slice(0, size) for size in source.shape]
        if axis is not None:
            index[axis] = slice(start, stop)
        name = self.spelling(source)
        if name != source.name and source.expert is not None:
            rows = index[0]
            index[0] = slice(source.first_row + rows.start, source.first_row + rows.stop)
            index.insert(0, source.expert)
        return self._slice(name)[tuple(index)]

    def _check_source(self, source: Source) -> None:
        name = self.spelling(source)
        tensor, path = self._slice(name), self.file_of[name]
        expected = source.shape if name == source.name else source.other_shape
        if tuple(tensor.get_shape()) != expected:
            raise ValueError(
                f"{path}: tensor {name} has shape {tuple(tensor.get_shape())}, "
                f"config.json asks for {expected}"
            )
        if tensor.get_dtype() not in FLOATS:
            raise ValueError(f"{path}: tensor {name} has type {tensor.get_dtype()}, not a float")

    def spelling(self, source: Source) -> str:
        """The name under which a source is there.

        Raises:
            ValueError: it is not.
        """
        for name in (source.name, source.other_name):
            if name in self.file_of:
                return name
        listing = INDEX if (self.directory / INDEX).is_file() else SINGLE
        raise ValueError(f"{self.directory / listing}: tensor {source.name} is missing")

    def _slice(self, name: str) -> Any:
        path = self.file_of[name]
        try:
            return self._open(path, name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read tensor {name}: {error}") from error

    def _find_tensors(self) -> dict[str, Path]:
        if (self.directory / INDEX).is_file():
            return self._read_index(self.directory / INDEX)
        single = self.directory / SINGLE
        files = [single] if single.is_file() else self._shards()
        found: dict[str, Path] = {}
        for path in files:
            for name in self._open(path, None).keys():
                if name in found:
                    raise ValueError(
                        f"{path}: tensor {name} is in {found[name].name}, too, and no {INDEX} "
                        "says which one counts"
                    )
                found[name] = path
        return found

    def _shards(self) -> list[Path]:
        """Files without an index: those named as shards, or all that there are.

        Raises:
            ValueError: there is none, or one of a numbered set is missing.
        """
        every = sorted(self.directory.glob("*.safetensors"))
        numbered = {path: SHARD.fullmatch(path.name) for path in every}
        shards = [path for path, match in numbered.items() if match]
        if shards:
            counts = {numbered[path][2] for path in shards}
            if len(shards) not in map(int, counts):
                raise ValueError(
                    f"{self.directory}: found {len(shards)} of {' or '.join(sorted(counts))} "
                    "shards of the model, and no index file"
                )
            return shards
        if every:
            return every
        pickles = [p.name for p in self.directory.glob("*") if p.suffix in PICKLES]
        found = ", ".join(sorted(pickles)) or "no weights"
        raise ValueError(
            f"{self.directory} must hold {SINGLE} or {INDEX}, found {found}: pickled weights may "
            "run code and are never loaded, convert them to safetensors"
        )

    def _read_index(self, path: Path) -> dict[str, Path]:
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{path} has no weight_map")
        files = {name: self.directory / file for name, file in names.items()}
        for name, file in files.items():
            if file.parent != self.directory:
                raise ValueError(f"{path}: tensor {name} lies outside of the directory, in {file}")
            if not file.is_file():
                raise ValueError(f"{file} does not exist, and should hold tensor {name}")
        return files

    def _open(self, path: Path, wanted: str | None) -> safe_open:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                name = cut_tensor(path) or wanted
                tensor = f"tensor {name} of it" if name else "its header, and so any tensor of it,"
                raise ValueError(f"{path}: {tensor} cannot be read: {error}") from error
        return self._files[path]


def cut_tensor(path: Path) -> str | None:
    """The first tensor, by its place in the file, that a truncated file does not hold in full."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
            header.pop("__metadata__", None)
            ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    held = path.stat().st_size - 8 - header_bytes
    return min((name for name, end in ends.items() if end > held), key=ends.get, default=None)
