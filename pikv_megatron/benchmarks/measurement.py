"""Builds the contestants, lets them decode at every context length, and keeps what was measured."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Callable

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pikv_megatron.benchmarks.decoding import (
    Contestant,
    DenseContestant,
    PiKVContestant,
    StockContestant,
)
from pikv_megatron.benchmarks.dense_context import (
    dense_layer_spec,
    grouped_attention,
    sdpa_attention,
)
from pikv_megatron.benchmarks.options import BenchmarkOptions
from pikv_megatron.benchmarks.timing import Race, attention_clock
from pikv_megatron.benchmarks.workload import Workload, random_kv
from pikv_megatron.checkpoint.model_builder import build_model, identity
from pikv_megatron.transformer.layer_specs import pikv_layer_spec

# In the order in which they are shown; the first one's logits are the reference.
GROUPED, SDPA, PIKV, STOCK = "dense, grouped product", "dense, SDPA", "PiKV", "stock Megatron"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NAMES = (GROUPED, SDPA, PIKV, STOCK)


@dataclass(frozen=True)
class Timing:
    """One contestant at one context length, on this rank.

    Attributes:
        step_ms: of every step, milliseconds.
        attention_ms: mean time in attention layers a step, milliseconds, of further steps.
    """

    step_ms: list[float]
    attention_ms: float

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
        differences: of logits from the reference's, as a share of the largest.
    """

    context_len: int
    timings: dict[str, Timing]
    differences: dict[str, float]

    def pikv_over_dense(self, figure: str = "mean_ms") -> float:
        """PiKV's time over that of the faster dense cache; small is good."""
        dense = min(getattr(self.timings[name], figure) for name in (GROUPED, SDPA))
        return getattr(self.timings[PIKV], figure) / dense

    def stock_over_pikv(self, figure: str = "mean_ms") -> float:
        """Stock Megatron's time over PiKV's; large is good."""
        return getattr(self.timings[STOCK], figure) / getattr(self.timings[PIKV], figure)


def build_models(
    options: BenchmarkOptions, groups: ProcessGroupCollection
) -> dict[str, GPTModel]:
    """A model for each contestant; they share the tensors of one set of random weights."""
    transforms = {
        GROUPED: dense_layer_spec,
        SDPA: dense_layer_spec,
        PIKV: lambda spec: pikv_layer_spec(spec, options.pikv),
        STOCK: identity,
    }
    models: dict[str, GPTModel] = {}
    for name in NAMES:
        torch.manual_seed(options.seed)
        model = build_model(options.architecture, groups, options.dtype, transforms[name])
        if models:
            model.load_state_dict(models[NAMES[0]].state_dict(), assign=True)
        models[name] = model
    return models


def measure(
    options: BenchmarkOptions, models: dict[str, GPTModel], context_len: int,
    on_step: Callable[[], None],
) -> Measurement:
    """Time every contestant behind `context_len` cached tokens.

    Args:
        on_step: called `num_steps_in_all(options)` times.

    Raises:
        ValueError: the contestants' logits differ.
    """
    groups = models[PIKV].pg_collection
    workload = Workload(
        context_len, context_len + num_steps_in_all(options), options.batch_size,
        groups.ep.size(), groups.ep.rank(), options.seed,
    )
    clock = CLOCKS[options.clock]
    race = Race(_contestants(options, models, workload), clock, options.pikv.flush_interval)
    tokens = workload.tokens(num_steps_in_all(options), options.architecture.vocab_size)
    extra = options.extra_steps
    warm_up, timed, last = tokens.split([extra, options.steps, extra])
    race.run(warm_up, on_step)
    seconds = race.run(timed, on_step)
    with ExitStack() as stack:
        attention = {
            name: stack.enter_context(attention_clock(models[name], clock)) for name in NAMES
        }
        race.run(last, on_step)
    timings = {
        name: Timing([1e3 * s for s in seconds[name]], 1e3 * attention[name].seconds / extra)
        for name in NAMES
    }
    return Measurement(context_len, timings, race.check())


def num_steps_in_all(options: BenchmarkOptions) -> int:
    """Timed steps at one context length, and those before and after them."""
    return options.steps + 2 * options.extra_steps


def _contestants(
    options: BenchmarkOptions, models: dict[str, GPTModel], workload: Workload
) -> dict[str, Contestant]:
    contestants = {
        GROUPED: DenseContestant(models[GROUPED], workload, grouped_attention),
        SDPA: DenseContestant(models[SDPA], workload, sdpa_attention),
        PIKV: PiKVContestant(models[PIKV], workload, options.pikv),
        STOCK: StockContestant(models[STOCK], workload),
    }
    layers = random_kv(models[PIKV], workload)
    for contestant in contestants.values():
        contestant.fill(layers)
    return contestants
