"""Times prompts, and measures the memory that they need besides the weights."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Mapping, Protocol

import torch

from pikv_megatron.benchmarks.model.contestants import workload_of
from pikv_megatron.benchmarks.model.timing import CLOCKS
from pikv_megatron.benchmarks.model.options import GROUPED, TRANSFORMERS, BenchmarkOptions
from pikv_megatron.benchmarks.model.peak_memory import peak_memory
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.benchmarks.model.transformers_decoding import TransformersContestant

# The first run of a contestant warms up, and its memory is what is measured.
REPEATS = 3


class Prefilling(Protocol):
    """A contestant that takes prompts."""

    def prefill(self, prompt: torch.Tensor) -> None:
        """Feed a new sequence [prompt_len] up to the logits of its last token."""


@dataclass(frozen=True)
class PrefillMeasurement:
    """One contestant over one prompt.

    Attributes:
        prompt_len: tokens.
        seconds: the fastest run.
        peak_bytes: the most memory at once besides what was held before; None: unknown.
    """

    prompt_len: int
    seconds: float
    peak_bytes: int | None


@torch.no_grad()
def measure_prefill(
    options: BenchmarkOptions, models: Mapping[str, torch.nn.Module], prompt_len: int,
    on_run: Callable[[int, int], None],
) -> dict[str, PrefillMeasurement]:
    """Time a prompt with every contestant that takes one, in turns, on one rank.

    Args:
        on_run: called with the runs that are done and their number.
    """
    clock = CLOCKS[options.clock]
    workload = workload_of(options, models[GROUPED], [prompt_len], 0)
    prompt = workload.tokens(prompt_len, options.architecture.vocab_size)[:, 0]
    names = [*options.pikv, *([TRANSFORMERS] if options.beside_transformers else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int | None] = {}
    for turn in range(1 + REPEATS):
        for place, name in enumerate(names):
            with ExitStack() as stack:
                # What the first run makes, moved weights and compiled kernels, is no prompt's.
                peak = stack.enter_context(peak_memory()) if turn == REPEATS else None
                contestant = _contestant(options, models, name, workload)
                start = clock()
                contestant.prefill(prompt)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append(clock() - start)
            if peak is not None:
                peaks[name] = peak.num_bytes
            on_run(turn * len(names) + place + 1, (1 + REPEATS) * len(names))
    return {
        name: PrefillMeasurement(prompt_len, min(seconds[name][1:]), peaks[name])
        for name in names
    }


def _contestant(options, models, name, workload) -> Prefilling:
    if name == TRANSFORMERS:
        return TransformersContestant(models[name], workload)
    return PiKVContestant(models[name], workload, options.pikv[name])
