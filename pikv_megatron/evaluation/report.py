"""The table and the file at the end of an evaluation."""

from dataclasses import asdict
from typing import Any, Sequence

import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from pikv_megatron.evaluation.figures import Evaluation
from pikv_megatron.evaluation.options import EvaluateOptions
from pikv_megatron.evaluation.task import RECALL, TEXT

PAGES_READ = "pages read\n% by layer"  # wraps where there are many layers
COLUMNS = (
    "recall\n%", "perplexity", "change\n%", "KL\nnats", PAGES_READ, "kept\n%", "bytes",
    "over\nlossless", "B a\ntoken", "times\nsmaller", "error K\nV, %", "ms a\nstep",
)


def report_table(options: EvaluateOptions, evaluations: Sequence[Evaluation]) -> Table:
    """A row for each cache, the reference first; what is read and timed is that of text.

    "B a token" and "times smaller" are of sealed pages; errors are relative, keys' and values'.
    """
    table = Table(
        title=f"{options.length} tokens: recall of pairs; text, a byte of its second half",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )
    table.add_column("cache", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=column != PAGES_READ)
    for evaluation in evaluations:
        table.add_row(evaluation.name, *_cells(evaluation, evaluations[0]))
    return table


def report_json(
    options: EvaluateOptions, evaluations: Sequence[Evaluation], machine: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """Every figure, and what is needed to measure it again."""
    return {
        "command": command,
        "machine": machine,
        "model": options.architecture.model_dump(mode="json"),
        "dtype": str(options.dtype).removeprefix("torch."),
        "length": options.length,
        "expert_parallel_size": dist.get_world_size(),
        "results": [_result(evaluation, evaluations[0]) for evaluation in evaluations],
    }


def change(evaluation: Evaluation, reference: Evaluation) -> float:
    """Of the perplexity of text, over the lossless cache's."""
    return evaluation.figures[TEXT].perplexity / reference.figures[TEXT].perplexity - 1


def _cells(evaluation: Evaluation, reference: Evaluation) -> list[str]:
    text = evaluation.figures[TEXT]
    return [
        f"{100 * evaluation.figures[RECALL].accuracy:.1f}",
        f"{text.perplexity:.4f}",
        f"{100 * change(evaluation, reference):+.2f}",
        f"{text.divergence:.5f}",
        " ".join(f"{100 * share:.1f}" for share in text.pages_read),
        f"{100 * sum(text.pages_kept) / len(text.pages_kept):.1f}",
        decimal(evaluation.allocated_bytes),
        f"{evaluation.allocated_bytes / reference.allocated_bytes:.3f}",
        f"{evaluation.token_bytes:.0f}",
        f"{reference.token_bytes / evaluation.token_bytes:.2f}",
        " ".join(f"{100 * evaluation.mean_error(side):.1f}" for side in (0, 1)),
        f"{text.step_ms:.1f}",
    ]


def _result(evaluation: Evaluation, reference: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "pikv": evaluation.pikv.model_dump(mode="json"),
        **{task: asdict(figures) for task, figures in evaluation.figures.items()},
        "perplexity_change": change(evaluation, reference),
        "allocated_bytes": evaluation.allocated_bytes,
        "bytes_over_lossless": evaluation.allocated_bytes / reference.allocated_bytes,
        "token_bytes": evaluation.token_bytes,
        "errors": evaluation.errors,
    }
