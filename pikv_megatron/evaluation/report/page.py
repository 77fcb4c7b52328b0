"""The HTML report: one file without anything from elsewhere."""

from collections.abc import Callable, Sequence
from html import escape
from statistics import mean

from pikv_megatron.evaluation.figures import Figures
from pikv_megatron.evaluation.report.svg import Point, heat_map, scatter
from pikv_megatron.evaluation.report.tables import (
    Grid,
    TextTable,
    accuracy_table,
    cost_table,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { padding: 3px 9px; border-bottom: 1px solid #e5e7eb; text-align: right;
  white-space: nowrap }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto; margin: 6px 10px 6px 0 }
code, pre { font-size: 13px; white-space: pre-wrap } summary { cursor: pointer; padding: 4px 0 }
"""
COSTS: dict[str, Callable[[Figures], float]] = {
    "KV bytes held by a rank, of a dense bfloat16 cache": lambda x: x.held_share,
    "KV bytes read a step, of a dense bfloat16 cache": lambda x: x.read_share,
    "milliseconds a decode step": lambda x: x.step_ms,
}


def cost_pictures(grid: Grid) -> list[str]:
    """Accuracy against each cost, a point a cache."""
    return [
        scatter(f"Accuracy against {label.split(',')[0]}", label, "accuracy, mean of tasks, %", [
            Point(cache, mean(map(cost, grid.every(cache))), grid.average(cache))
            for cache in grid.caches
        ])
        for label, cost in COSTS.items() if all(min(map(cost, grid.every(c))) for c in grid.caches)
    ]


def html_report(grid: Grid, title: str, notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        grid: what was measured.
        title: of the page.
        notes: how it was measured, a line each.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p><code>{escape(n)}</code></p>" for n in notes)]
    parts += ["<h2>What it costs, and what it is worth</h2>", *cost_pictures(grid)]
    for table in (accuracy_table(grid), cost_table(grid)):
        parts += [f"<h2>{escape(table.title)}</h2>", _html_table(table)]
    parts.append("<h2>Attention read, pages kept, shards and experts</h2>")
    for cache in grid.caches:
        pictures = "".join(_heat_maps(grid, cache))
        parts.append(f"<details><summary>{escape(cache)}</summary>{pictures}</details>")
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>" + "\n".join(parts)
        + "</body></html>\n"
    )


def _html_table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _heat_maps(grid: Grid, cache: str) -> list[str]:
    every = grid.every(cache)
    layers = [f"layer {i}" for i in range(len(every[0].pages_read))]
    parts = [f"part {i}" for i in range(len(every[0].kept_by_position[0]))]
    shards = [f"s{i}" for i in range(len(every[0].tokens_by_shard[0]))]
    experts = [f"expert {i}" for i in range(len(every[0].tokens_by_expert))]
    probed = [(task, x) for task, x in zip(grid.tasks, every) if x.mass_read]
    masses = [[100 * x.mass_read[i] for _, x in probed] for i in range(len(layers))]
    kept = [x.kept_by_position for x in every]
    return [
        heat_map("Attention read by task", layers, [task for task, _ in probed], masses, " %"),
        heat_map("Tokens kept by position", layers, parts, _mean(kept, 100), " %"),
        heat_map("Tokens by shard", layers, shards, _mean([x.tokens_by_shard for x in every])),
        heat_map("Prompt tokens from experts to shards", experts, shards,
                 _mean([x.tokens_by_expert for x in every])),
    ]


def _mean(maps: Sequence[Sequence[Sequence[float]]], factor: float = 1.0) -> list[list[float]]:
    """Over tasks, cell by cell."""
    return [[factor * mean(cells) for cells in zip(*rows)] for rows in zip(*maps)]
