"""Text that every machine has: the sources of Python's standard library.

A file belongs to the held-out split by the hash of its path, so a module stays on its side of the
split whatever the Python version.
"""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from pikv_megatron.demo.tokenizer import EOS_ID

HELD_OUT_SHARE = 1 / 16
# Tests, other people's packages, and tables of codes rather than text.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings",
                   "pydoc_data", "lib-dynload", "__pycache__"}  # fmt: skip


def stdlib_sources(held_out: bool) -> list[Path]:
    """The source files of one split, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen = [name for name in _names(root) if is_held_out(name.as_posix()) == held_out]
    return [root / name for name in sorted(chosen)]


def is_held_out(name: str) -> bool:
    """Whether the file of that relative path is kept for evaluation."""
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return first < HELD_OUT_SHARE * 2**32


def load_corpus(held_out: bool) -> Tensor:
    """One split as token ids `[tokens]`, every file closed by the end-of-text token."""
    ids = bytearray()
    ends = []
    for path in stdlib_sources(held_out):
        ids += path.read_bytes()
        ends.append(len(ids))
        ids.append(0)
    tokens = torch.frombuffer(ids, dtype=torch.uint8).to(torch.int64)
    tokens[ends] = EOS_ID
    return tokens


def _names(root: Path) -> Iterator[Path]:
    """Paths below `root`; folders that hold none, site-packages above all, are not entered."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if _is_text_folder(name)]
        paths = (Path(folder, name).relative_to(root) for name in files)
        yield from (path for path in paths if _is_text(path))


def _is_text_folder(name: str) -> bool:
    return name not in SKIPPED_FOLDERS and not name.startswith("config-")


def _is_text(path: Path) -> bool:
    return path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
