"""Time decoding: python launch/benchmark.py (under deepspeed --num_accelerators N with N ranks)."""

import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

import torch
from rich.console import Console

from pikv_megatron import destroy_process_groups, init_process_groups
from pikv_megatron.benchmarks.model.contestants import build_models
from pikv_megatron.benchmarks.model.latency import collective_latency_ms
from pikv_megatron.benchmarks.model.measurement import Measurement, measure
from pikv_megatron.benchmarks.model.options import BenchmarkOptions, parse_options
from pikv_megatron.benchmarks.model.prefill import measure_prefill
from pikv_megatron.benchmarks.model.ragged import measure_ragged
from pikv_megatron.benchmarks.model.report import report_json
from pikv_megatron.benchmarks.model.result import BenchmarkResult
from pikv_megatron.benchmarks.model.tables import report_tables
from pikv_megatron.inference.program import IS_FIRST_RANK, command, refuse, use_device
from pikv_megatron.inference.progress import progress

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> int:
    """Run on every rank; the first one prints what it measured."""
    try:
        options = parse_options(sys.argv[1:], CONFIGS)
        use_device()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            result = run(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        Console().print(*report_tables(options, result), sep="\n")
        if options.output is not None:
            report = report_json(options, result, command())
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def run(options: BenchmarkOptions) -> BenchmarkResult:
    """Measure at every context length, over the mixed batch, and every prompt, as was asked."""
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    models = build_models(options, groups)
    device = next(models[options.names[0]].parameters()).device
    latency_ms = collective_latency_ms(groups.ep, device, options.clock)
    measurements = [
        measure_at(options, models, length, batch_size)
        for length in options.contexts for batch_size in options.batch_sizes
    ]
    ragged = {}
    for name in options.pikv if options.lengths else ():
        with progress(f"mixed batch, {name}", IS_FIRST_RANK) as advance:
            ragged[name] = measure_ragged(options, models, name, advance)
    prefills = []
    for length in options.prompts:
        with progress(f"prompts of {length:,} tokens", IS_FIRST_RANK) as advance:
            prefills.append(measure_prefill(options, models, length, advance))
    return BenchmarkResult(measurements, ragged, prefills, latency_ms)


def measure_at(
    options: BenchmarkOptions, models: dict[str, torch.nn.Module], context_len: int,
    batch_size: int,
) -> Measurement:
    """Measure behind one context length and show how far it is."""
    num_done = 0
    with progress(f"{batch_size} x {context_len:,} cached tokens", IS_FIRST_RANK) as advance:

        def on_step() -> None:
            nonlocal num_done
            num_done += 1
            advance(num_done, options.num_steps)

        return measure(options, models, context_len, batch_size, on_step)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
