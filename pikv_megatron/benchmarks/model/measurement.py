"""Lets all contestants decode behind one context length, and keeps what was measured."""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Callable, Iterable, Mapping

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.contestants import build_contestants, workload_of
from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.benchmarks.model.operator_calls import attention_calls
from pikv_megatron.benchmarks.model.options import (
    COUNTED_STEPS,
    GROUPED,
    SDPA,
    BenchmarkOptions,
)
from pikv_megatron.benchmarks.model.timing import CLOCKS, Race, attention_clock, of_ranks

FIGURES = ("mean_ms", "median_ms", "attention_ms")


@dataclass(frozen=True)
class Timing:
    """One contestant at one context length, on this rank.

    Attributes:
        step_ms: of every step, milliseconds.
        attention_ms: mean time in attention a step, milliseconds, of further steps.
        operator_calls: torch operators that a layer's attention calls in a step without a flush.
        difference: of its logits from the reference's, as a share of the largest.
        is_lossless: this difference is a matter of rounding only.
    """

    step_ms: list[float]
    attention_ms: float
    operator_calls: float
    difference: float
    is_lossless: bool

    @property
    def mean_ms(self) -> float:
        """Flushes of a PiKV cache included, as the steps are whole flush intervals."""
        return mean(self.step_ms)

    @property
    def median_ms(self) -> float:
        """Of a step without a flush, and without the machine's hiccups."""
        return median(self.step_ms)


@dataclass(frozen=True)
class Measurement:
    """All contestants at one context length.

    Attributes:
        context_len: tokens that were cached before the first step.
        timings: by contestant.
    """

    context_len: int
    timings: Mapping[str, Timing]

    def times_as_fast(self, name: str, *others: str) -> dict[str, float]:
        """How many times as fast as the fastest of the others a contestant is, by figure."""
        return {
            figure: min(getattr(self.timings[other], figure) for other in others)
            / getattr(self.timings[name], figure)
            for figure in FIGURES
        }

    def than_dense(self, name: str) -> dict[str, float]:
        """The same beside the faster dense cache."""
        return self.times_as_fast(name, GROUPED, SDPA)

    def lossless_pikv(self, names: Iterable[str]) -> str | None:
        """The first of some contestants that is lossless."""
        return next((name for name in names if self.timings[name].is_lossless), None)


def measure(
    options: BenchmarkOptions, models: Mapping[str, GPTModel], context_len: int,
    on_step: Callable[[], None],
) -> Measurement:
    """Time every contestant behind `context_len` cached tokens.

    Args:
        on_step: called `options.num_steps` times.

    Raises:
        ValueError: the logits of lossless contestants differ.
    """
    lengths = [context_len] * options.batch_size
    workload = workload_of(options, models[GROUPED], lengths, options.num_steps)
    contestants = build_contestants(options, models, workload)
    clock = CLOCKS[options.clock]
    race = Race(contestants, clock, options.flush_interval)
    tokens = workload.tokens(options.num_steps, options.architecture.vocab_size)
    extra = options.extra_steps
    warm_up, timed, last, counted = tokens.split([extra, options.steps, extra, COUNTED_STEPS])
    race.run(warm_up, on_step)
    seconds = race.run(timed, on_step)
    with ExitStack() as stack:
        attention = {
            name: stack.enter_context(attention_clock(contestant, clock))
            for name, contestant in contestants.items()
        }
        race.run(last, on_step)
    calls, differences = _count_calls(contestants, counted, on_step), race.check()
    timings = {}
    for name, contestant in contestants.items():
        *steps, attending = of_ranks(options.clock, [*seconds[name], attention[name].seconds])
        timings[name] = Timing(
            [1e3 * s for s in steps], 1e3 * attending / extra, calls[name], differences[name],
            contestant.is_lossless,
        )
    return Measurement(context_len, timings)


def _count_calls(
    contestants: Mapping[str, Contestant], tokens: torch.Tensor, on_step: Callable[[], None]
) -> dict[str, float]:
    """Of the last of some steps: tokens [steps, batch_size]."""
    for step_tokens in tokens:
        calls = {name: attention_calls(c, step_tokens) for name, c in contestants.items()}
        on_step()
    return calls
