"""Times operations in turns, and the copy that their bytes per second are compared with."""

import time
from statistics import median
from typing import Callable, Mapping

import torch

Run = Callable[[], object]
COPY_BYTES = 256 << 20
QUICK_COPY_BYTES = 16 << 20


class OpTimer:
    """Medians of interleaved calls.

    Contestants take turns, so that a machine with other work disturbs all of them alike. Nothing
    is flushed between turns: an op without peers is timed as in a loop.

    Args:
        device: where the work is done; CUDA is timed by events, a CPU by its wall clock.
        rounds: calls of each contestant that count.
        seconds: no further round is begun after this time.
    """

    WARM_UP, FEWEST = 1, 3

    def __init__(self, device: torch.device, rounds: int, seconds: float):
        self.device = device
        self._rounds = rounds
        self._seconds = seconds

    @torch.no_grad()
    def milliseconds(self, contestants: Mapping[str, Run], calls: int = 1) -> dict[str, float]:
        """The median time of a call, by contestant.

        Args:
            calls: of one contestant in a turn, timed as one.
        """
        times: dict[str, list[float]] = {name: [] for name in contestants}
        start = time.perf_counter()
        for index in range(self.WARM_UP + self._rounds):
            is_late = time.perf_counter() - start > self._seconds
            if is_late and index >= self.WARM_UP + self.FEWEST:
                break
            for name, run in contestants.items():
                elapsed = self._turn(run, calls)
                if index >= self.WARM_UP:
                    times[name].append(elapsed / calls)
        return {name: median(values) for name, values in times.items()}

    def _turn(self, run: Run, calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def copy_bandwidth(timer: OpTimer, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy of `num_bytes`."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source).fill_(1)
    elapsed = timer.milliseconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2e3 * num_bytes / elapsed
