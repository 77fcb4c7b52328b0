"""Measure quality: python launch/evaluate.py --model models/demo --pikv FILE [FILE ...]

The same under deepspeed --num_accelerators N with N ranks, over which sequences are dealt.
"""

import os
import sys
import time
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

import torch.distributed as dist
from rich.console import Console

from pikv_megatron import destroy_process_groups, init_process_groups, pikv_layer_spec
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import Evaluator
from pikv_megatron.evaluation.figures import Record
from pikv_megatron.evaluation.judge import Reference
from pikv_megatron.evaluation.options import EvaluateOptions, parse_options
from pikv_megatron.evaluation.report.page import cost_pictures, html_report
from pikv_megatron.evaluation.report.results import Results, settings_of
from pikv_megatron.evaluation.report.tables import Grid, accuracy_table, cost_table
from pikv_megatron.inference.program import IS_FIRST_RANK, command, refuse, use_device
from pikv_megatron.inference.progress import progress
from pikv_megatron.runtime.machine import machine

TABLE_WIDTH = 180  # where there is no terminal, rich would squeeze it into 80


def main() -> int:
    """Run on every rank; the first one prints and writes what was measured."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            grid = run(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        show(options, grid)
    return 0


def run(options: EvaluateOptions) -> Grid:
    """Every task over all caches, the lossless one first; what is known is not run again."""
    tasks = {name: options.build(name) for name in options.tasks}
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    results = Results(
        None if options.out is None else options.out / "results.json",
        settings_of(options, dist.get_world_size()),
    )
    records = find(options, results)
    if len(records) < len(options.caches) * len(tasks):
        model = load_huggingface(
            options.model, groups, options.dtype,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        )
        evaluator = Evaluator(model.eval(), options.architecture.vocab_size, options.batch_size)
        for pikv in options.caches.values():
            evaluator.check(pikv)
        for task, parts in tasks.items():
            evaluate(options, evaluator, task, parts, results, records)
    return Grid(list(options.caches), list(tasks), records)


def find(options: EvaluateOptions, results: Results) -> dict[tuple[str, str], Record]:
    """What the first rank's file knows, told to all ranks."""
    known = [{}]
    if IS_FIRST_RANK:
        known = [{
            (name, task): found for name, pikv in options.caches.items() for task in options.tasks
            if (found := results.find(name, task, pikv)) is not None
        }]
    dist.broadcast_object_list(known)
    return known[0]


def evaluate(
    options: EvaluateOptions, evaluator: Evaluator, task: str, parts: list, results: Results,
    records: dict[tuple[str, str], Record],
) -> None:
    """One task. The lossless cache is fed again where others lack: they are judged by it."""
    missing = [name for name in options.caches if (name, task) not in records]
    if not missing:
        return
    reference = Reference()
    for name in dict.fromkeys([next(iter(options.caches)), *missing]):
        pikv, num_done = options.caches[name], 0
        with progress(f"{task}: {name}", IS_FIRST_RANK) as advance:

            def on_step() -> None:
                nonlocal num_done
                num_done += 1
                advance(num_done, evaluator.num_steps(parts, pikv))

            figures = evaluator.run(parts, pikv, reference, on_step)
        if name in missing:
            records[name, task] = record = Record.of(name, task, pikv, figures)
            if IS_FIRST_RANK:
                results.add(record, pikv, provenance())


def provenance() -> dict[str, object]:
    """How and where a record was measured."""
    return {"command": command(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}


def show(options: EvaluateOptions, grid: Grid) -> None:
    """Print the tables, and write the report beside the results."""
    console, tables = Console(), (accuracy_table(grid), cost_table(grid))
    console = Console(width=max(TABLE_WIDTH, console.width))
    for table in tables:
        console.print(table.rich())
    if options.out is None:
        return
    title = f"{options.model.name}, {options.length} tokens, seed {options.seed}"
    source = provenance()
    notes = [source["command"], f"{source['date']}, {source['machine']}"]
    markdown = "\n".join([f"## {title}\n", *(f"    {n}\n" for n in notes),
                          *(t.markdown() for t in tables)])
    (options.out / "report.md").write_text(markdown, encoding="utf-8")
    (options.out / "report.html").write_text(html_report(grid, title, notes), encoding="utf-8")
    (options.out / "held.svg").write_text(cost_pictures(grid)[0], encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
