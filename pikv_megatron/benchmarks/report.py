"""The table and the file at the end of a benchmark."""

import os
import platform
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
from rich.table import Table

from pikv_megatron.benchmarks.measurement import NAMES, Measurement, Timing
from pikv_megatron.benchmarks.options import BenchmarkOptions

FIGURES = ("mean_ms", "median_ms")


def report_table(options: BenchmarkOptions, measurements: Sequence[Measurement]) -> Table:
    """Milliseconds a decode step and their ratios; one column for each context length."""
    clock = {"wall": "milliseconds", "cpu": "milliseconds of processor time"}[options.clock]
    table = Table(title=f"{clock} per decode step: mean (median) of {options.steps}")
    table.add_column("cached tokens")
    for measurement in measurements:
        table.add_column(f"{measurement.context_len:,}", justify="right")

    def row(title: str, cell: Callable[[Measurement], str]) -> None:
        table.add_row(title, *(cell(measurement) for measurement in measurements))

    for name in NAMES:
        row(name, lambda m: _pair(m.timings[name].mean_ms, m.timings[name].median_ms))
    table.add_section()
    for name in NAMES:
        row(f"in attention: {name}", lambda m: f"{m.timings[name].attention_ms:.2f}")
    table.add_section()
    row("PiKV / faster dense", lambda m: _pair(*_ratios(m.pikv_over_dense)))
    row("stock / PiKV", lambda m: _pair(*_ratios(m.stock_over_pikv)))
    return table


def report_json(
    options: BenchmarkOptions, measurements: Sequence[Measurement], command: str
) -> dict[str, Any]:
    """Every figure, and what is needed to measure it again."""
    return {
        "command": command,
        "machine": machine(),
        "model": options.architecture.model_dump(mode="json"),
        "pikv": options.pikv.model_dump(mode="json"),
        "dtype": str(options.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "expert_parallel_size": dist.get_world_size(),
        "steps": options.steps,
        "clock": options.clock,
        "seed": options.seed,
        "results": [_result(measurement) for measurement in measurements],
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    has_cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if has_cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _result(measurement: Measurement) -> dict[str, Any]:
    timings = measurement.timings
    return {
        "context_len": measurement.context_len,
        "contestants": {
            name: {**_figures(timings[name]), "difference": measurement.differences[name]}
            for name in NAMES
        },
        "pikv_over_faster_dense": dict(zip(FIGURES, _ratios(measurement.pikv_over_dense))),
        "stock_over_pikv": dict(zip(FIGURES, _ratios(measurement.stock_over_pikv))),
    }


def _figures(timing: Timing) -> dict[str, Any]:
    return {
        "mean_ms": timing.mean_ms,
        "median_ms": timing.median_ms,
        "attention_ms": timing.attention_ms,
        "step_ms": timing.step_ms,
    }


def _ratios(ratio: Callable[[str], float]) -> list[float]:
    return [ratio(figure) for figure in FIGURES]


def _pair(first: float, second: float) -> str:
    return f"{first:.2f} ({second:.2f})"
