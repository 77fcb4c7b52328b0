"""Lets all contestants decode behind one context length, and keeps what was measured."""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.collectives import collective_clocks
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
from pikv_megatron.benchmarks.model.traffic import StepTraffic, traffic

FIGURES = ("mean_ms", "median_ms", "attention_ms")


@dataclass(frozen=True)
class Timing:
    """One contestant at one context length, on this rank.

    Attributes:
        step_ms: of every step, milliseconds.
        attention_ms: mean time in attention a step, milliseconds, of further steps.
        collective_ms: of the same steps, in all collectives of the model.
        operator_calls: torch operators that a layer's attention calls in a step without a flush.
        cache_bytes: of the cache, on the rank that has most.
        traffic: bytes that a PiKV cache sends in a step; None: not one, or alone.
        difference: of its logits from the reference's, as a share of the largest.
        is_lossless: this difference is a matter of rounding only.
    """

    step_ms: list[float]
    attention_ms: float
    collective_ms: float
    operator_calls: float
    cache_bytes: int
    traffic: StepTraffic | None
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
    """All contestants at one context length and batch size.

    Attributes:
        context_len: tokens that were cached before the first step.
        batch_size: sequences on all ranks.
        timings: by contestant.
    """

    context_len: int
    batch_size: int
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
    batch_size: int, on_step: Callable[[], None],
) -> Measurement:
    """Time every contestant with so many sequences, each behind `context_len` cached tokens.

    Args:
        on_step: called `options.num_steps` times.

    Raises:
        ValueError: the logits of lossless contestants differ.
    """
    lengths = [context_len] * batch_size
    workload = workload_of(options, models[GROUPED], lengths, options.num_steps)
    contestants = build_contestants(options, models, workload)
    clock = CLOCKS[options.clock]
    race = Race(contestants, clock, options.flush_interval)
    tokens = workload.tokens(options.num_steps, options.architecture.vocab_size)
    extra = options.extra_steps
    warm_up, timed, last, counted, metered = tokens.split(
        [extra, options.steps, extra, COUNTED_STEPS, options.metered_steps]
    )
    race.run(warm_up, on_step)
    seconds = race.run(timed, on_step)
    with ExitStack() as stack:
        attention = {
            name: stack.enter_context(attention_clock(contestant, clock))
            for name, contestant in contestants.items()
        }
        collectives = stack.enter_context(collective_clocks(contestants, clock))
        race.run(last, on_step)
    calls = _count_calls(contestants, counted, on_step)
    sent = traffic(options, contestants, metered, on_step)
    differences = race.check()
    timings = {}
    for name, contestant in contestants.items():
        parts = attention[name].seconds / extra, collectives[name].seconds / extra
        *steps, attending, exchanging = of_ranks(options.clock, [*seconds[name], *parts])
        timings[name] = Timing(
            [1e3 * s for s in steps], 1e3 * attending, 1e3 * exchanging, calls[name],
            _most(contestant.cache_bytes()), sent.get(name), differences[name],
            contestant.is_lossless,
        )
    return Measurement(context_len, batch_size, timings)


def _most(of_rank: int) -> int:
    """Of all ranks."""
    most = torch.tensor(of_rank)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _count_calls(
    contestants: Mapping[str, Contestant], tokens: torch.Tensor, on_step: Callable[[], None]
) -> dict[str, float]:
    """Of the last of some steps: tokens [steps, batch_size]."""
    for step_tokens in tokens:
        calls = {name: attention_calls(c, step_tokens) for name, c in contestants.items()}
        on_step()
    return calls
