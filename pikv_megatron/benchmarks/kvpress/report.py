"""The comparison as a table, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pikv_megatron.benchmarks.kvpress.options import CompareOptions
from pikv_megatron.benchmarks.kvpress.trial import Score
from pikv_megatron.evaluation.report.svg import Point, scatter
from pikv_megatron.runtime.machine import machine

PEER = "kvpress"


@dataclass(frozen=True)
class Result:
    """One contestant at one budget.

    Attributes:
        name: of the contestant.
        budget: share of the bytes as computed; 1: nothing was compressed.
        keep: share of the tokens, or of the pages, that stay; None: layers differ.
        scores: by task.
    """

    name: str
    budget: float
    keep: float | None
    scores: dict[str, Score]

    @property
    def held_share(self) -> float:
        """Bytes really held over those as computed, metadata included."""
        held, dense = (
            sum(getattr(score, name) for score in self.scores.values())
            for name in ("held_bytes", "dense_bytes")
        )
        return held / dense

    def accuracy(self, task: str) -> float:
        return self.scores[task].num_right / max(1, self.scores[task].num_answers)

    @property
    def average(self) -> float:
        """Over tasks."""
        return mean(map(self.accuracy, self.scores))


def report_table(options: CompareOptions, results: Sequence[Result]) -> Table:
    """A row for each contestant and budget, the cache as computed first."""
    table = Table(title=f"{options.length} tokens; answers right, %", box=SIMPLE_HEAD)
    table.add_column("cache", no_wrap=True)
    for column in ("budget", "held", "kept", *options.tasks, "average"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.name, f"{result.budget:.3g}", f"{result.held_share:.3f}",
            "-" if result.keep is None else f"{result.keep:.3f}",
            *(f"{100 * result.accuracy(task):.1f}" for task in options.tasks),
            f"{100 * result.average:.1f}",
        )
    return table


def report_picture(options: CompareOptions, results: Sequence[Result]) -> str:
    """SVG: accuracy against bytes, every press, and the best one of ours at each budget."""
    whole, *others = results
    peers = [each for each in others if each.name.startswith(PEER)]
    own = [each for each in others if not each.name.startswith(PEER)]
    best = [
        max((x for x in own if x.budget == budget), key=lambda x: (x.average, -x.held_share))
        for budget in dict.fromkeys(each.budget for each in own)
    ]
    # One that is best at several budgets is one point.
    best = list({(each.name, each.held_share): each for each in best}.values())
    return scatter(
        f"{options.model.name}, {options.length:,} tokens: accuracy against KV bytes",
        "KV bytes held, of those as computed", f"right answers, %: {', '.join(options.tasks)}",
        [
            Point(x.name, x.held_share, 100 * x.average, x in peers)
            for x in (whole, *peers, *best)
        ],
    )


def report_json(
    options: CompareOptions, results: Sequence[Result], command: str
) -> dict[str, Any]:
    """Every figure, and what is needed to measure it again."""
    return {
        "command": command,
        "machine": machine(),
        "model": options.architecture.model_dump(mode="json"),
        "dtype": str(options.dtype).removeprefix("torch."),
        "length": options.length,
        "results": [
            asdict(result) | {"held_share": result.held_share, "average": result.average}
            for result in results
        ],
    }
