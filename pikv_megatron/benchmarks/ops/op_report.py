"""The table, the file and the plot of `pikv_megatron.benchmarks.ops.run`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Sequence

from rich.table import Table

from pikv_megatron.benchmarks.ops.op_result import OpResult
from pikv_megatron.runtime.machine import machine

COLUMNS = ("ms", "GB/s", "% of copy", "ratio to peer")


def op_table(results: Sequence[OpResult], copy_bandwidth: float) -> Table:
    """One row a case."""
    table = Table(title=f"medians; a copy moves {copy_bandwidth / 1e9:.1f} GB/s; ratio: the "
                  "fastest peer's time over the whole cache / the op's")
    for name in ("op", "payload", "case"):
        table.add_column(name, overflow="fold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for index, result in enumerate(results):
        if index and result.op != results[index - 1].op:
            table.add_section()
        table.add_row(
            result.op, result.payload, result.case, f"{result.ms:.3f}",
            f"{result.gigabytes_per_second:.1f}", f"{100 * result.copy_share:.0f}",
            "-" if result.fastest_peer is None
            else f"{result.peer_ratio:.2f} ({result.fastest_peer})",
        )
    return table


def op_json(
    results: Sequence[OpResult], refused: dict[str, str], copy_bandwidth: float, command: str,
    seed: int,
) -> dict[str, Any]:
    """Every figure, and what is needed to measure it again.

    Args:
        refused: why, by the name of the operation.
    """
    return {
        "command": command,
        "seed": seed,
        "machine": machine(),
        "copy_bytes_per_second": copy_bandwidth,
        "refused": refused,
        "results": [_figures(result) for result in results],
    }


def _figures(result: OpResult) -> dict[str, Any]:
    return {
        **vars(result),
        "bytes_per_second": 1e9 * result.gigabytes_per_second,
        "fastest_peer": result.fastest_peer,
        "peer_ratio": result.peer_ratio,
    }


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        ValueError: there is no such place, or matplotlib is missing.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"--plot {path}: cannot write a file there")
    if path is not None and find_spec("matplotlib") is None:
        raise ValueError(
            f"--plot {path}: needs matplotlib; pip install matplotlib, or leave --plot out"
        )


def plot(results: Sequence[OpResult], path: Path) -> None:
    """Bars: the speed beside the fastest peer where there is one, and the share of the copy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rivals = [result for result in results if result.peer_ratio is not None]
    panels = [
        (rivals, [result.peer_ratio for result in rivals], "times as fast as the fastest peer"),
        (results, [100 * result.copy_share for result in results], "% of the copy bandwidth"),
    ]
    figure = Figure(figsize=(11, 2 + 0.16 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (shown, values, title) in zip(figure.subplots(1, 2), panels):
        labels = [f"{result.op} {result.payload}, {result.case}" for result in shown]
        axes.barh(range(len(shown)), values)
        # Where all have peers, the first panel's labels serve both.
        is_labelled = shown is rivals or len(rivals) < len(results)
        axes.set_yticks(range(len(shown)), labels if is_labelled else [""] * len(shown), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
        if shown is rivals:
            axes.axvline(1.0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=80)
