"""Measures every cache of a command line on every task, where that was not done before."""

import os
import time

import torch.distributed as dist

from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.evaluator import Evaluator
from pikv_megatron.evaluation.figures import Record
from pikv_megatron.evaluation.judge import Reference
from pikv_megatron.evaluation.options import EvaluateOptions
from pikv_megatron.evaluation.report.results import Results, settings_of
from pikv_megatron.evaluation.report.tables import Grid
from pikv_megatron.inference.program import IS_FIRST_RANK, command
from pikv_megatron.inference.progress import progress
from pikv_megatron.runtime.machine import machine
from pikv_megatron.runtime.process_groups import init_process_groups
from pikv_megatron.transformer.layer_specs import pikv_layer_spec


def measure(options: EvaluateOptions) -> Grid:
    """Every task over all caches, the lossless one first; what is known is not run again. Called on
    every rank.

    Raises:
        ValueError: a cache does not fit the model, or the results' file holds something else.
    """
    tasks = {name: options.build(name) for name in options.tasks}
    groups = init_process_groups(expert_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    results = Results(
        None if options.out is None else options.out / "results.json",
        settings_of(options, dist.get_world_size()),
    )
    records = _find(options, results)
    if len(records) < len(options.caches) * len(tasks):
        model = load_huggingface(
            options.model, groups, options.dtype,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        )
        evaluator = Evaluator(model.eval(), options.architecture.vocab_size, options.batch_size)
        for pikv in options.caches.values():
            evaluator.check(pikv)
        for task, parts in tasks.items():
            _evaluate(options, evaluator, task, parts, results, records)
    return Grid(list(options.caches), list(tasks), records)


def provenance() -> dict[str, object]:
    """How and where a record was measured."""
    return {"command": command(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}


def _find(options: EvaluateOptions, results: Results) -> dict[tuple[str, str], Record]:
    """What the first rank's file knows, told to all ranks."""
    known = [{}]
    if IS_FIRST_RANK:
        known = [{
            (name, task): found for name, pikv in options.caches.items() for task in options.tasks
            if (found := results.find(name, task, pikv)) is not None
        }]
    dist.broadcast_object_list(known)
    return known[0]


def _evaluate(
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
