"""The tables at the end of a benchmark."""

from typing import Mapping, Sequence

from rich.table import Table

from pikv_megatron.benchmarks.model.measurement import Measurement, Timing
from pikv_megatron.benchmarks.model.options import STOCK, BenchmarkOptions
from pikv_megatron.benchmarks.model.ragged import RaggedMeasurement

UNITS = {"wall": "milliseconds", "cpu": "milliseconds of processor time"}


def report_tables(
    options: BenchmarkOptions, measurements: Sequence[Measurement],
    ragged: Mapping[str, RaggedMeasurement],
) -> list[Table]:
    """Those of what was measured."""
    tables = [_times(options, measurements), _ratios(options, measurements)] if measurements else []
    return tables + ([_mixed_batch(options, ragged)] if ragged else [])


def _times(options: BenchmarkOptions, measurements: Sequence[Measurement]) -> Table:
    table = _table(
        f"{UNITS[options.clock]} per decode step: mean (median) of {options.steps}",
        "step", "in\nattention", "operator\ncalls", "difference",
    )
    table.caption = (
        "attention: from RoPE to the output, without the projections on either side; operator "
        "calls: torch operators that it calls a layer in a step without a flush; difference: of "
        "the logits from the first contestant's, as a share of the largest"
    )
    for measurement in measurements:
        for name, timing in measurement.timings.items():
            table.add_row(f"{measurement.context_len:,}", name, *_cells(timing))
        table.add_section()
    return table


def _cells(timing: Timing) -> list[str]:
    return [
        f"{timing.mean_ms:.2f} ({timing.median_ms:.2f})", f"{timing.attention_ms:.2f}",
        f"{timing.operator_calls:.1f}", f"{timing.difference:.0e}",
    ]


def _ratios(options: BenchmarkOptions, measurements: Sequence[Measurement]) -> Table:
    table = _table(
        "how many times as fast PiKV is: mean (median)",
        "dense\n/ PiKV", "in\nattention", "lossless\n/ PiKV", "in\nattention", "stock\n/ PiKV",
    )
    table.caption = "dense: the faster of the two"
    for measurement in measurements:
        lossless = measurement.lossless_pikv(options.pikv)
        for name in options.pikv:
            pairs = [*_pair(measurement.than_dense(name)), "", ""]
            if lossless is not None and name != lossless:
                pairs[2:] = _pair(measurement.times_as_fast(name, lossless))
            stock = _pair(measurement.times_as_fast(name, STOCK))[0]
            table.add_row(f"{measurement.context_len:,}", name, *pairs, stock)
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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, caption_justify="left")
    table.add_column("cached\ntokens", justify="right")
    table.add_column("contestant", overflow="fold", min_width=12)
    for column in columns:
        table.add_column(column, justify="right")
    return table
