"""The safetensors files of a Hugging Face directory, and which tensor lies in which."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pikv_megatron.checkpoint.json_file import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class TensorFiles:
    """Files are mapped, and only the slices asked for are read.

    Attributes:
        directory: holds them.
        file_of: by tensor.

    Raises:
        ValueError: the directory holds no safetensors, or a file is missing, cut or broken.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[Path, safe_open] = {}
        self.file_of = self._find_tensors()

    def slice(self, name: str) -> Any:
        """A tensor to be read in part.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.file_of[name]
        try:
            return self._open(path, name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read tensor {name}: {error}") from error

    @property
    def listing(self) -> Path:
        """The file that says what there is, for messages."""
        path = self.directory / INDEX
        return path if path.is_file() else self.directory / SINGLE

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
