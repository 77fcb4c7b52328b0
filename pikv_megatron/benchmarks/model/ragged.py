"""What a batch of sequences of mixed lengths costs, beside what its own tokens cost.

A sequence's own cost is its share of a batch that is as large and in which all sequences have its
length. Padding, or work for the longest sequence's sake, makes the mixed batch cost more than the
sum of these shares. Dense caches pad by nature, so only PiKV caches take part.
"""

from dataclasses import dataclass
from statistics import median
from typing import Callable, Iterator, Mapping

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.contestants import workload_of
from pikv_megatron.benchmarks.model.options import BenchmarkOptions
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.benchmarks.model.timing import CLOCKS, attention_clock, of_ranks
from pikv_megatron.benchmarks.model.workload import random_kv


@dataclass(frozen=True)
class RaggedMeasurement:
    """One PiKV cache over a mixed batch, on this rank.

    Attributes:
        lengths: cached tokens of every sequence of the mixed batch before the first step.
        mixed_ms: time in attention a step, milliseconds.
        even_ms: the same of a batch of as many sequences of one length, by length.
    """

    lengths: tuple[int, ...]
    mixed_ms: float
    even_ms: Mapping[int, float]

    @property
    def parts_ms(self) -> float:
        """The sum of each sequence's share of the batch of its equals."""
        return sum(self.even_ms[length] for length in self.lengths) / len(self.lengths)

    @property
    def mixed_over_parts(self) -> float:
        """1: a mixed batch costs what its tokens cost."""
        return self.mixed_ms / self.parts_ms


def measure_ragged(
    options: BenchmarkOptions, models: Mapping[str, GPTModel], name: str,
    on_turn: Callable[[int, int], None],
) -> RaggedMeasurement:
    """Time the mixed batch and the even ones in turns.

    Args:
        name: the PiKV cache.
        on_turn: called with the turns that are done and their number.
    """
    model, mixed = models[name], options.lengths
    even = {length: (length,) * len(mixed) for length in sorted(set(mixed))}
    batches = _batches(options, model, name, {mixed, *even.values()})
    seconds: dict[tuple[int, ...], list[float]] = {lengths: [] for lengths in batches}
    num_turns = len(batches) * (options.steps + options.extra_steps) // options.flush_interval
    for done, (lengths, taken) in enumerate(_turns(options, batches), start=1):
        seconds[lengths].append(taken)
        on_turn(done, num_turns)
    # The first turn warms up.
    step_ms = {
        lengths: 1e3 * median(of_ranks(options.clock, taken[1:])) / options.flush_interval
        for lengths, taken in seconds.items()
    }
    return RaggedMeasurement(mixed, step_ms[mixed], {n: step_ms[even[n]] for n in even})


@torch.no_grad()
def _batches(
    options: BenchmarkOptions, model: GPTModel, name: str, batches: set[tuple[int, ...]]
) -> dict[tuple[int, ...], PiKVContestant]:
    """A contestant for each batch, by its lengths; all have the same tokens in their caches."""
    num_steps = options.steps + options.extra_steps
    contestants = {}
    longest = [max(options.lengths)] * len(options.lengths)
    layers = random_kv(model, workload_of(options, model, longest, num_steps))
    for lengths in sorted(batches):
        workload = workload_of(options, model, lengths, num_steps)
        contestants[lengths] = PiKVContestant(model, workload, options.pikv[name])
        contestants[lengths].fill(layers)
    return contestants


@torch.no_grad()
def _turns(
    options: BenchmarkOptions, batches: Mapping[tuple[int, ...], PiKVContestant]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Lengths of a batch and seconds in its attention, one turn after the other."""
    first = next(iter(batches.values()))
    num_steps = options.steps + options.extra_steps
    tokens = first.workload.tokens(num_steps, options.architecture.vocab_size)
    for turn_tokens in tokens.split(options.flush_interval):
        for lengths, contestant in batches.items():
            with attention_clock(contestant, CLOCKS[options.clock]) as attention:
                for step_tokens in turn_tokens:
                    contestant.step(step_tokens)
            yield lengths, attention.seconds
