"""The lock under which DeepSpeed's collectives for CPUs are compiled and loaded.

It is a file that torch's `FileBaton` waits for without an end: where its process was killed, it
stays, and every later rank would hang.
"""

import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

EXTENSION = "deepspeed_shm_comm"
# Compiling takes a minute or two, and several where ranks share few cores.
LONGEST_SECONDS = 600.0


def await_extension_lock(longest_seconds: float = LONGEST_SECONDS) -> None:
    """Wait while another process compiles, so that what comes next finds no lock.

    Raises:
        RuntimeError: the lock is older than `longest_seconds`.
    """
    lock = Path(_get_build_directory(EXTENSION, False), "lock")
    while (age := _age(lock)) is not None:
        if age > longest_seconds:
            raise RuntimeError(
                f"{lock} is {age / 60:.0f} minutes old: the process that compiled DeepSpeed's "
                "collectives was killed, and this one would wait for ever; remove the file"
            )
        time.sleep(0.1)


def _age(path: Path) -> float | None:
    """Seconds since a file was made; None: there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
