"""Builds the C++ kernels for this machine's processor, once, and calls them."""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import time
import warnings
from array import array
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# Without the two -fno, exponentials and rounding are calls instead of vectors.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
         "-fopenmp", "-fPIC", "-shared")
BUILD_TIMEOUT = 300.0


def is_available() -> bool:
    """Whether the kernels can be called; they are built if they were not."""
    return _library() is not None


def call(name: str, fields: list[int], *numbers: float) -> None:
    """Call a kernel with integers, addresses among them, further numbers, and torch's threads.

    Args:
        name: `pikv_NAME` in the library; its sources say which fields it reads.
    """
    packed = array("q", fields)
    arguments = map(ctypes.c_float, numbers)
    getattr(_library(), f"pikv_{name}")(
        ctypes.c_void_p(packed.buffer_info()[0]), *arguments, torch.get_num_threads()
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the CPU kernels could not be built, so slower operations of torch are used: {reason}",
            RuntimeWarning, stacklevel=4,
        )
        return None


def _built() -> Path:
    """The library for these sources, this compiler and this processor.

    Raises:
        OSError: there is no compiler, or no folder to write to.
        CalledProcessError: it failed.
    """
    name = os.environ.get("CXX", "c++")
    compiler = shlex.split(name)
    if not compiler or shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"C++ compiler {name!r} not found; install one or set CXX")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pikv_megatron"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"kernels_{_fingerprint(compiler)}.so"
    with open(folder / "lock", "w") as lock:
        _wait_for(lock)
        if not path.exists():
            _build(compiler, path)
    return path


def _wait_for(lock) -> None:
    """Let one rank build for all; the lock of a process that ended is free."""
    deadline = time.monotonic() + BUILD_TIMEOUT
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)


def _build(compiler: list[str], path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(unfinished)]
    subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT
    )
    unfinished.replace(path)


def _fingerprint(compiler: list[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, timeout=BUILD_TIMEOUT
    ).stdout
    digest = hashlib.sha256(version + " ".join([*compiler, *FLAGS]).encode() + _processor())
    for path in (*SOURCES, *HEADERS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """What tells processors apart: a home folder can be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"".join(line for line in lines[:32] if line.startswith((b"model name", b"flags")))
