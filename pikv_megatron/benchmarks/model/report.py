"""The file at the end of a benchmark."""

from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from pikv_megatron.benchmarks.model.measurement import Measurement, Timing
from pikv_megatron.benchmarks.model.options import STOCK, BenchmarkOptions
from pikv_megatron.benchmarks.model.ragged import RaggedMeasurement
from pikv_megatron.benchmarks.model.result import BenchmarkResult
from pikv_megatron.runtime.machine import machine


def report_json(
    options: BenchmarkOptions, result: BenchmarkResult, command: str
) -> dict[str, Any]:
    """Every figure, and what is needed to measure it again."""
    return {
        "command": command,
        "machine": machine(),
        "model": options.architecture.model_dump(mode="json"),
        "weights": "random" if options.checkpoint is None else str(options.checkpoint),
        "pikv": {name: pikv.model_dump(mode="json") for name, pikv in options.pikv.items()},
        "dtype": str(options.dtype).removeprefix("torch."),
        "expert_parallel_size": dist.get_world_size(),
        "steps": options.steps,
        "clock": options.clock,
        "seed": options.seed,
        "collective_latency_ms": result.latency_ms,
        "results": [_result(options, measurement) for measurement in result.measurements],
        "mixed_batch": {name: _mixed_batch(own) for name, own in result.ragged.items()},
        "prompts": [
            {name: asdict(own) for name, own in by_name.items()} for by_name in result.prefills
        ],
    }


def _result(options: BenchmarkOptions, measurement: Measurement) -> dict[str, Any]:
    """Ratios are the others' times over the contestant's: above 1, it is the faster one."""
    contestants = {name: _figures(timing) for name, timing in measurement.timings.items()}
    lossless = measurement.lossless_pikv(options.pikv)
    for name in options.pikv:
        contestants[name] |= {
            "faster_dense_over_this": measurement.than_dense(name),
            "stock_over_this": measurement.times_as_fast(name, STOCK),
        }
        if lossless is not None and name != lossless:
            ratios = measurement.times_as_fast(name, lossless)
            contestants[name] |= {"lossless": lossless, "lossless_over_this": ratios}
    return {
        "context_len": measurement.context_len, "batch_size": measurement.batch_size,
        "contestants": contestants,
    }


def _figures(timing: Timing) -> dict[str, Any]:
    return {"mean_ms": timing.mean_ms, "median_ms": timing.median_ms, **asdict(timing)}


def _mixed_batch(measured: RaggedMeasurement) -> dict[str, Any]:
    own = {"parts_ms": measured.parts_ms, "mixed_over_parts": measured.mixed_over_parts}
    return {**asdict(measured), **own}
