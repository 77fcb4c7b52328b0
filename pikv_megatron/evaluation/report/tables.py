"""The tables of an evaluation, as text cells: for the terminal, Markdown and HTML."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pikv_megatron.evaluation.figures import Figures, Record, change
from pikv_megatron.evaluation.tasks.recall import Recall
from pikv_megatron.evaluation.tasks.registry import TASKS
from pikv_megatron.evaluation.tasks.text import Text

MANY_LAYERS = 6  # with more, a table has their mean only
NOT_MEASURED = "-"
LEAST_WIDTH = 180  # of a terminal; where there is none, rich would squeeze tables into 80


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: what it is of.
        columns: their headings.
        rows: as many cells each.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """With a heading."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"### {self.title}\n\n{table}\n"


def print_tables(tables: Iterable[TextTable]) -> None:
    """To the terminal."""
    console = Console(width=max(LEAST_WIDTH, Console().width))
    for table in tables:
        console.print(table.rich())


@dataclass(frozen=True)
class Grid:
    """Every cache on every task.

    Attributes:
        caches: names, the lossless one first.
        tasks: names.
        records: by cache and task.
    """

    caches: list[str]
    tasks: list[str]
    records: dict[tuple[str, str], Record]

    def figures(self, cache: str, task: str) -> Figures:
        """What was measured."""
        return self.records[cache, task].figures

    def every(self, cache: str) -> list[Figures]:
        """Of all tasks."""
        return [self.figures(cache, task) for task in self.tasks]

    @property
    def scored(self) -> list[str]:
        """The tasks whose accuracy counts."""
        return [task for task in self.tasks if TASKS[task].is_scored] or self.tasks

    def average(self, cache: str) -> float:
        """Accuracy, the mean over tasks, percent."""
        return 100 * mean(self.figures(cache, task).accuracy for task in self.scored)


Cell = Callable[[Grid, str], str]  # of a cache


def accuracy_table(grid: Grid) -> TextTable:
    """Accuracy by task, and beside it whole answers where they differ from tokens."""
    rows = []
    for cache in grid.caches:
        cells = [_accuracy(grid.figures(cache, task)) for task in grid.scored]
        rows.append([cache, f"{grid.average(cache):.1f}", *cells])
    title = "Accuracy: tokens of answers, percent (whole answers)"
    return TextTable(title, ["cache", "average", *grid.scored], rows)


def cost_table(grid: Grid) -> TextTable:
    """How far each cache is from the lossless one, and what it reads, holds, sends and takes: means
    over tasks. A column that is the same for all caches says nothing, and is left out."""
    columns = {
        title: cells for title, cell in COSTS.items()
        if len(set(cells := [cell(grid, cache) for cache in grid.caches])) > 1
    }
    rows = [list(row) for row in zip(grid.caches, *columns.values())]
    return TextTable(
        "Closeness to the lossless cache and cost; ms are of a rank's processor, on a GPU by the "
        "wall", ["cache", *columns], rows,
    )


def _accuracy(figures: Figures) -> str:
    text = f"{100 * figures.accuracy:.1f}"
    if figures.num_answers == figures.num_judged:
        return text
    return f"{text} ({100 * figures.exact:.0f})"


def _recall(grid: Grid, cache: str) -> str:
    return _of_task(grid, cache, Recall.name, lambda x: f"{100 * x.accuracy:.1f}")


def _perplexity(grid: Grid, cache: str) -> str:
    def cell(figures: Figures) -> str:
        more = change(figures, grid.figures(grid.caches[0], Text.name))
        return f"{figures.perplexity:.3f} ({100 * more:+.2f}%)"

    return _of_task(grid, cache, Text.name, cell)


def _greedy(grid: Grid, cache: str) -> str:
    return _of_task(grid, cache, "greedy", lambda x: f"{x.agreed_tokens:.1f}")


def _of_task(grid: Grid, cache: str, task: str, cell: Callable[[Figures], str]) -> str:
    return cell(grid.figures(cache, task)) if task in grid.tasks else NOT_MEASURED


def _mean_of(figure: Callable[[Figures], float | None], form: str) -> Cell:
    """Over the tasks in which it was measured."""

    def cell(grid: Grid, cache: str) -> str:
        found = [value for x in grid.every(cache) if (value := figure(x)) is not None]
        return format(mean(found), form) if found else NOT_MEASURED

    return cell


def _layers_of(figure: Callable[[Figures], list[float]], over: Callable = mean) -> Cell:
    """A share, by layer where layers differ, mean over tasks or the largest."""

    def cell(grid: Grid, cache: str) -> str:
        measured = [values for x in grid.every(cache) if (values := figure(x))]
        layers = [over(values) for values in zip(*measured)]
        if not layers:
            return NOT_MEASURED
        percents = [f"{100 * x:.0f}" for x in layers]
        if len(layers) > MANY_LAYERS or len(set(percents)) == 1:
            return f"{100 * mean(layers):.1f}"
        return " / ".join(percents)

    return cell


def _held(grid: Grid, cache: str) -> str:
    held = mean(figures.held_share for figures in grid.every(cache))
    return f"{held:.3f} (1/{1 / held:.1f})"


def _token_bytes(grid: Grid, cache: str) -> str:
    own, whole = (grid.every(name)[0].token_bytes for name in (cache, grid.caches[0]))
    return f"{own:.0f} (1/{whole / own:.1f})"


def _errors(grid: Grid, cache: str) -> str:
    every = grid.every(cache)
    return ", ".join(f"{100 * mean(x.mean_error(side) for x in every):.1f}" for side in (0, 1))


# By title; each says a cell of a cache.
COSTS: dict[str, Cell] = {
    "recall %": _recall,
    "mass %": _mean_of(lambda x: 100 * x.mean_mass if x.mass_read else None, ".1f"),
    "perplexity": _perplexity,
    "KL": _mean_of(lambda x: x.divergence, ".4f"),
    "greedy": _greedy,
    "pages read %": _layers_of(lambda x: x.pages_read),
    "bound %": _layers_of(lambda x: x.bounds, max),
    "kept %": _layers_of(lambda x: x.pages_kept),
    "read / dense": _mean_of(lambda x: x.read_share, ".3f"),
    "held / dense": _held,
    "B a token": _token_bytes,
    "error K, V %": _errors,
    "KiB sent a step": _mean_of(lambda x: x.sent_bytes / 1024, ".1f"),
    "ms a step": _mean_of(lambda x: x.step_ms or None, ".2f"),
}
