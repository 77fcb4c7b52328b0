"""The most memory that a piece of work needed at once."""

import ctypes
import gc
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes above what was held before; None where the system does not tell."""

    num_bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the `with` block: of the GPU where there is one, else of this process (Linux)."""
    peak = PeakMemory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    try:
        # What was freed before would be used again without being counted.
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # resets VmHWM
        before = _kilobytes("VmRSS")
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    peak.num_bytes = max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")
