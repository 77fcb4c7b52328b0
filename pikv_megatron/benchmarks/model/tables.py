"""The tables at the end of a benchmark."""

from typing import Mapping, Sequence

from rich.table import Table

from pikv_megatron.benchmarks.model.measurement import Measurement, Timing
from pikv_megatron.benchmarks.model.options import STOCK, TRANSFORMERS, BenchmarkOptions
from pikv_megatron.benchmarks.model.prefill import PrefillMeasurement
from pikv_megatron.benchmarks.model.ragged import RaggedMeasurement
from pikv_megatron.benchmarks.model.result import BenchmarkResult

UNITS = {"wall": "milliseconds", "cpu": "milliseconds of processor time"}


def report_tables(options: BenchmarkOptions, result: BenchmarkResult) -> list[Table]:
    """Those of what was measured."""
    tables = []
    if result.measurements:
        tables += [
            _times(options, result), _bytes(result), _ratios(options, result.measurements)
        ]
    if result.ragged:
        tables.append(_mixed_batch(options, result.ragged))
    if result.prefills:
        tables.append(_prefills(options, result.prefills))
    return tables


def _times(options: BenchmarkOptions, result: BenchmarkResult) -> Table:
    table = _table(
        f"{UNITS[options.clock]} per decode step: mean (median) of {options.steps}",
        "step", "in\nattention", "in\ncollectives", "operator\ncalls", "difference",
    )
    table.caption = (
        "attention: from RoPE to the output, without the projections on either side; collectives: "
        "posting them and waiting, attention's among them; operator calls: torch operators that it "
        "calls a layer in a step without a flush; difference: of the logits from the first "
        "contestant's, as a share of the largest"
    )
    if result.latency_ms is not None:
        table.caption += (
            f". A collective that carries nothing takes {result.latency_ms:.2f} "
            f"{UNITS[options.clock]}"
        )
    for measurement in result.measurements:
        for name, timing in measurement.timings.items():
            table.add_row(*_which(measurement, name), *_cells(timing))
        table.add_section()
    return table


def _cells(timing: Timing) -> list[str]:
    return [
        f"{timing.mean_ms:.2f} ({timing.median_ms:.2f})", f"{timing.attention_ms:.2f}",
        f"{timing.collective_ms:.2f}", f"{timing.operator_calls:.1f}", f"{timing.difference:.0e}",
    ]


def _bytes(result: BenchmarkResult) -> Table:
    columns = ["cache\nMiB"]
    if result.latency_ms is not None:
        columns += ["sent a step\nKiB", "planned\nKiB"]
    table = _table("what the caches take, of the fullest rank", *columns)
    if result.latency_ms is not None:
        table.caption = (
            "sent: what the first rank hands to the cache's collectives, by DeepSpeed's logger; "
            "planned: by the planner, with a router the most"
        )
    for measurement in result.measurements:
        for name, timing in measurement.timings.items():
            sent = [f"{count / 1024:,.1f}" for count in timing.traffic or ()]
            table.add_row(*_which(measurement, name), _mebibytes(timing.cache_bytes), *sent)
        table.add_section()
    return table


def _which(measurement: Measurement, name: str) -> tuple[str, str]:
    tokens = f"{measurement.context_len:,}"
    many = measurement.batch_size > 1
    return f"{measurement.batch_size} x {tokens}" if many else tokens, name


def _ratios(options: BenchmarkOptions, measurements: Sequence[Measurement]) -> Table:
    table = _table(
        "how many times as fast PiKV is: mean (median)",
        "dense\n/ PiKV", "in\nattention", "lossless\n/ PiKV", "in\nattention", "stock\n/ PiKV",
        *(["transformers\n/ PiKV"] if options.beside_transformers else []),
    )
    table.caption = "dense: the faster of the two"
    for measurement in measurements:
        lossless = measurement.lossless_pikv(options.pikv)
        for name in options.pikv:
            pairs = [*_pair(measurement.than_dense(name)), "", ""]
            if lossless is not None and name != lossless:
                pairs[2:] = _pair(measurement.times_as_fast(name, lossless))
            pairs += [_pair(measurement.times_as_fast(name, STOCK))[0]]
            if options.beside_transformers:
                pairs += [_pair(measurement.times_as_fast(name, TRANSFORMERS))[0]]
            table.add_row(*_which(measurement, name), *pairs)
        table.add_section()
    return table


def _pair(ratios: Mapping[str, float]) -> list[str]:
    """Of the whole step, and in attention alone."""
    return [
        f"{ratios['mean_ms']:.2f} ({ratios['median_ms']:.2f})", f"{ratios['attention_ms']:.2f}"
    ]


def _mixed_batch(
    options: BenchmarkOptions, ragged: Mapping[str, RaggedMeasurement]
) -> Table:
    lengths, columns = options.lengths, ("mixed batch", "sum of parts", "mixed / parts")
    table = _table(
        f"{UNITS[options.clock]} in attention per decode step of {len(lengths)} sequences", *columns
    )
    table.caption = (
        "part: a sequence's share of a batch that is as large and in which all have its length"
    )
    cached = f"{min(lengths):,} to {max(lengths):,}"
    for name, measured in ragged.items():
        figures = measured.mixed_ms, measured.parts_ms, measured.mixed_over_parts
        table.add_row(cached, name, *(f"{figure:.2f}" for figure in figures))
    return table


def _prefills(
    options: BenchmarkOptions, prefills: Sequence[Mapping[str, PrefillMeasurement]]
) -> Table:
    columns = ["seconds", "tokens / s", "MiB at\nonce"]
    if options.beside_transformers:
        columns += ["transformers\n/ PiKV", "PiKV MiB /\ntransformers"]
    table = _table("prompts: the fastest of several runs", *columns)
    table.caption = "MiB at once: the most memory besides what was held before, cache included"
    for by_name in prefills:
        for name, own in by_name.items():
            table.add_row(f"{own.prompt_len:,}", name, *_prefill_cells(own, by_name))
        table.add_section()
    return table


def _prefill_cells(
    own: PrefillMeasurement, by_name: Mapping[str, PrefillMeasurement]
) -> list[str]:
    cells = [
        f"{own.seconds:.3f}", f"{own.prompt_len / own.seconds:,.0f}", _mebibytes(own.peak_bytes)
    ]
    other = by_name.get(TRANSFORMERS)
    if other is not None and other is not own:
        cells.append(f"{other.seconds / own.seconds:.2f}")
        if own.peak_bytes is not None and other.peak_bytes:
            cells.append(f"{own.peak_bytes / other.peak_bytes:.2f}")
    return cells


def _mebibytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**20:,.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, caption_justify="left")
    table.add_column("cached\ntokens", justify="right")
    table.add_column("contestant", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right")
    return table
