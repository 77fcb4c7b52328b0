"""The tables of an evaluation, as text cells: for the terminal, Markdown and HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pikv_megatron.evaluation.figures import Figures, Record, change
from pikv_megatron.evaluation.tasks.registry import TASKS
from pikv_megatron.evaluation.tasks.text import Text

MANY_LAYERS = 6  # with more, a table has their mean only


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


def accuracy_table(grid: Grid) -> TextTable:
    """Accuracy by task, and beside it whole answers where they differ from tokens."""
    rows = []
    for cache in grid.caches:
        cells = [_accuracy(grid.figures(cache, task)) for task in grid.scored]
        rows.append([cache, f"{grid.average(cache):.1f}", *cells])
    title = "Accuracy: tokens of answers, percent (whole answers)"
    return TextTable(title, ["cache", "average", *grid.scored], rows)


def cost_table(grid: Grid) -> TextTable:
    """What a cache holds and reads, and how far it is from the lossless one: means over tasks."""
    columns = [
        "cache", "average", "perplexity", "change %", "KL", "greedy", "mass %", "pages read %",
        "bound %", "kept %", "held / dense", "read / dense", "B a token", "error K, V %",
        "ms a step",
    ]
    rows = [[cache, f"{grid.average(cache):.1f}", *_cost(grid, cache)] for cache in grid.caches]
    return TextTable("Cost and closeness to the lossless cache", columns, rows)


def _accuracy(figures: Figures) -> str:
    text = f"{100 * figures.accuracy:.1f}"
    if figures.num_answers == figures.num_judged:
        return text
    return f"{text} ({100 * figures.exact:.0f})"


def _cost(grid: Grid, cache: str) -> list[str]:
    every, reference = grid.every(cache), grid.every(grid.caches[0])
    text, greedy = Text.name, "greedy"
    perplexity, relative = "-", "-"
    if text in grid.tasks:
        figures = grid.figures(cache, text)
        perplexity = f"{figures.perplexity:.4f}"
        relative = f"{100 * change(figures, grid.figures(grid.caches[0], text)):+.2f}"
    agreed = "-"
    if greedy in grid.tasks:
        figures = grid.figures(cache, greedy)
        agreed = f"{figures.agreed_tokens:.1f}"
    held = mean(figures.held_share for figures in every)
    return [
        perplexity, relative, f"{mean(x.divergence for x in every):.4f}", agreed,
        f"{100 * mean(x.mean_mass for x in every if x.mass_read):.1f}"
        if any(x.mass_read for x in every) else "-",
        _by_layer([x.pages_read for x in every]), _bounds(every),
        _by_layer([x.pages_kept for x in every]),
        f"{held:.3f} (1/{1 / held:.1f})", f"{mean(x.read_share for x in every):.3f}",
        f"{every[0].token_bytes:.0f} (1/{reference[0].token_bytes / every[0].token_bytes:.1f})",
        ", ".join(f"{100 * mean(x.mean_error(side) for x in every):.1f}" for side in (0, 1)),
        f"{mean(x.step_ms for x in every):.1f}",
    ]


def _bounds(every: Sequence[Figures]) -> str:
    """The largest of all tasks."""
    layers = [max(values) for values in zip(*(x.bounds for x in every if x.bounds))]
    return _by_layer([layers]) if layers else "-"


def _by_layer(shares: Sequence[Sequence[float]]) -> str:
    layers = [mean(values) for values in zip(*shares)]
    if len(layers) > MANY_LAYERS or len({f"{x:.3f}" for x in layers}) == 1:
        return f"{100 * mean(layers):.1f}"
    return " / ".join(f"{100 * x:.0f}" for x in layers)
