"""Find layers that look far: python launch/ablate.py --model DIR --pikv small_pages

Lets one layer after the other stream, the others being whole, and prints what that costs. Takes the
options of launch/evaluate.py; the layers that cost little may stream in a configuration's `layers`.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from statistics import mean

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

from rich.console import Console

from pikv_megatron import destroy_process_groups, init_process_groups, pikv_layer_spec
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import Evaluator, lossless
from pikv_megatron.evaluation.figures import Figures
from pikv_megatron.evaluation.judge import Reference
from pikv_megatron.evaluation.options import EvaluateOptions, parse_options
from pikv_megatron.evaluation.report.tables import TextTable
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device
from pikv_megatron.inference.progress import progress
from pikv_megatron.layer_options import LayerOverride

STREAMS = {"retention": "streaming", "budget": {"name": "pages", "pages": 1}}


def main() -> int:
    """Run on every rank; the first one prints."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            by_layer = run(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        Console().print(table(options, by_layer).rich())
    return 0


def run(options: EvaluateOptions) -> list[list[Figures]]:
    """By layer, of every task; in the sizes of the cache that is named last."""
    tasks = [options.build(name) for name in options.tasks]
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    model = load_huggingface(
        options.model, groups, options.dtype,
        spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
    )
    evaluator = Evaluator(model.eval(), options.architecture.vocab_size, options.batch_size)
    whole = lossless(list(options.caches.values())[-1])
    references = [Reference() for _ in tasks]
    for parts, reference in zip(tasks, references):
        evaluator.run(parts, whole, reference, lambda: None)
    by_layer: list[list[Figures]] = []
    num_layers = options.architecture.num_layers
    with progress("layers", IS_FIRST_RANK) as advance:
        for layer in range(num_layers):
            streams = LayerOverride(match=str(layer), **STREAMS)
            pikv = whole.model_copy(update={"layers": (streams,)})
            by_layer.append([
                evaluator.run(parts, pikv, reference, lambda: None)
                for parts, reference in zip(tasks, references)
            ])
            advance(layer + 1, num_layers)
    return by_layer


def table(options: EvaluateOptions, by_layer: Sequence[Sequence[Figures]]) -> TextTable:
    """A row a layer, means over tasks."""
    rows = [
        [
            str(layer), f"{mean(x.divergence for x in every):.4f}",
            f"{100 * mean(x.accuracy for x in every):.1f}",
            f"{100 * mean(x.mass_read[layer] for x in every if x.mass_read):.1f}",
        ]
        for layer, every in enumerate(by_layer)
    ]
    columns = ["layer that streams", "KL", "accuracy %", "mass it reads %"]
    return TextTable(f"One layer streams: {', '.join(options.tasks)}", columns, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
