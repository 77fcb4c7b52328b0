"""What a training run leaves beside the weights: numbers as JSON, and curves as a picture."""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pikv_megatron.demo.evaluation import NUM_BUCKETS, RecallResult

RECORD_NAME = "training.json"
PLOT_NAME = "training.png"


@dataclass
class TrainingRecord:
    """A run and what its saved weights can do.

    Attributes:
        seed: of weights and batches.
        parameters: how many there are.
        weight_bytes: of `model.safetensors`.
        seconds: wall-clock, training alone.
        core_seconds: processor time of all its threads.
        threads: how many computed.
        recall: exact recall by length, on held-out seeds.
        perplexity: per byte of held-out text, by the length of the windows; their second halves
            count.
        curve: what `train` returns.
        python: the version whose standard library was read.
    """

    seed: int
    parameters: int
    weight_bytes: int
    seconds: float
    core_seconds: float
    threads: int
    recall: list[RecallResult]
    perplexity: dict[int, float]
    curve: list[dict[str, Any]]
    python: str = field(default_factory=platform.python_version)

    def save(self, directory: Path) -> None:
        """Write `training.json`."""
        fields = json.loads(json.dumps(asdict(self)), parse_float=_rounded)
        curve = fields.pop("curve")
        body = json.dumps(fields, indent=2)[:-2]  # a point of the curve stays on one line
        points = ",\n    ".join(map(json.dumps, curve))
        text = f'{body},\n  "curve": [\n    {points}\n  ]\n}}\n'
        (directory / RECORD_NAME).write_text(text)

    def tables(self) -> list[Table]:
        """Recall by length and position; perplexity; cost."""
        return [_recall_table(self.recall), _text_table(self.perplexity), self._cost_table()]

    def _cost_table(self) -> Table:
        table = Table("", "", show_header=False)
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("bytes of weights", f"{self.weight_bytes:,}")
        table.add_row("minutes of training", f"{self.seconds / 60:.1f}")
        table.add_row("the same by processor time", f"{self.core_seconds / self.threads / 60:.1f}")
        return table


def plot_curve(curve: list[dict[str, Any]], directory: Path) -> None:
    """Write `training.png`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3), layout="constrained")
    steps = [point["step"] for point in curve]
    recall, text = figure.subplots(1, 2)
    recall.plot(steps, [100 * point["recall_accuracy"] for point in curve])
    recall.set(xlabel="step", ylabel="% of answers right, training", ylim=(0, 100))
    text.plot(steps, [point["text_loss"] for point in curve])
    text.set(xlabel="step", ylabel="nats per byte of text, training")
    figure.savefig(directory / PLOT_NAME, dpi=80)


def _rounded(text: str) -> float:
    return round(float(text), 4)


def _recall_table(results: list[RecallResult]) -> Table:
    lengths = [f"{result.length:,}" for result in results]
    table = Table("tokens", *lengths, title="Exact recall, in all and by where the pair stood")
    table.add_row("pairs", *(f"{result.num_pairs}" for result in results))
    table.add_row("questions", *(f"{result.num_queries:,}" for result in results))
    table.add_row("% right", *(f"{100 * result.accuracy:.1f}" for result in results))
    for i in range(NUM_BUCKETS):
        shares = (f"{100 * result.by_position[i]:.1f}" for result in results)
        table.add_row(f"% right, eighth {i + 1}", *shares)
    return table


def _text_table(perplexity: dict[int, float]) -> Table:
    table = Table("bytes of context", "perplexity a byte", title="Held-out text")
    for length, value in perplexity.items():
        table.add_row(f"{length // 2} to {length - 1}", f"{value:.3f}")
    return table
