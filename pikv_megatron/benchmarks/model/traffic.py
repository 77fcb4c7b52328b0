"""What PiKV caches send in a step, beside what the planner says."""

from typing import Callable, Mapping, NamedTuple

import torch

from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.benchmarks.model.options import BenchmarkOptions
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.inference.traffic import TrafficMeter
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.target import Target
from pikv_megatron.planner.traffic import decode_traffic

# The benchmark chooses no tokens and so sends none.
CACHE_OPS = "query", "combine", "flush"


class StepTraffic(NamedTuple):
    """Bytes that the first rank hands to the cache's collectives, the mean over steps.

    Attributes:
        measured: by DeepSpeed's communication logger.
        planned: by the planner; with a router at most so much.
    """

    measured: float
    planned: float


def traffic(
    options: BenchmarkOptions, contestants: Mapping[str, Contestant], tokens: torch.Tensor,
    on_step: Callable[[], None],
) -> dict[str, StepTraffic]:
    """Of every PiKV cache, from further steps; nothing on one rank.

    Args:
        tokens: [steps, batch_size], a whole flush interval.
    """
    if not len(tokens):
        return {}
    found = {}
    for name, contestant in contestants.items():
        meter = TrafficMeter(tuple(f"pikv_{op}" for op in CACHE_OPS))
        meter.start()
        for step_tokens in tokens:
            with torch.no_grad():
                contestant.step(step_tokens)
        meter.stop()
        if isinstance(contestant, PiKVContestant):
            measured = sum(meter.bytes_by_op().values()) / len(tokens)
            found[name] = StepTraffic(measured, _planned(options, contestant))
    for _ in tokens:
        on_step()
    return found


def _planned(options: BenchmarkOptions, contestant: PiKVContestant) -> float:
    workload = contestant.workload
    target = Target(
        options.architecture, contestant.pikv, workload.num_ranks, workload.batch_size,
        workload.capacity, options.num_steps, options.dtype,
    )
    planned = decode_traffic(target, PlannedCache(target))
    return sum(getattr(planned, op) for op in CACHE_OPS)
