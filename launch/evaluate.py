"""Measure quality: python launch/evaluate.py --model models/demo --pikv FILE [FILE ...]

The same under deepspeed --num_accelerators N with N ranks, over which sequences are dealt.
"""

import json
import os
import sys
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

from rich.console import Console

from pikv_megatron import destroy_process_groups, init_process_groups, pikv_layer_spec
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import LOSSLESS, Evaluator, lossless
from pikv_megatron.evaluation.figures import Evaluation
from pikv_megatron.evaluation.options import EvaluateOptions, parse_options
from pikv_megatron.evaluation.report import report_json, report_table
from pikv_megatron.evaluation.task import build_tasks
from pikv_megatron.inference.program import IS_FIRST_RANK, command, refuse, use_device
from pikv_megatron.inference.progress import progress
from pikv_megatron.runtime.machine import machine

BATCH_SIZE = 16  # sequences of all ranks at once, so that a step's own cost does not prevail
TABLE_WIDTH = 140  # where there is no terminal, rich would squeeze it into 80


def main() -> int:
    """Run on every rank; the first one prints what was measured."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            evaluations = run(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        console = Console(width=max(TABLE_WIDTH, Console().width))
        console.print(report_table(options, evaluations))
        if options.output is not None:
            report = report_json(options, evaluations, machine(), command())
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def run(options: EvaluateOptions) -> list[Evaluation]:
    """Evaluate the lossless cache, laid out as the first of the others, and then the others."""
    evaluator = build_evaluator(options)
    for pikv in options.caches.values():
        evaluator.check(pikv)
    first = next(iter(options.caches.values()))
    caches = [(LOSSLESS, lossless(first)), *options.caches.items()]
    return [evaluate(evaluator, name, pikv) for name, pikv in caches]


def build_evaluator(options: EvaluateOptions) -> Evaluator:
    """The model and the sequences that are fed to it."""
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    model = load_huggingface(
        options.model, groups, options.dtype,
        spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
    )
    tasks = build_tasks(
        options.byte_ids, options.length, options.num_questions, options.num_texts
    )
    return Evaluator(model.eval(), options.architecture.vocab_size, tasks, BATCH_SIZE)


def evaluate(evaluator: Evaluator, name: str, pikv: PiKVConfig) -> Evaluation:
    """One cache, with a progress bar."""
    num_done = 0
    with progress(name, IS_FIRST_RANK) as advance:

        def on_step() -> None:
            nonlocal num_done
            num_done += 1
            advance(num_done, evaluator.num_steps(pikv))

        return evaluator.run(name, pikv, on_step)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
