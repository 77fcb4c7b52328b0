"""Compare with NVIDIA kvpress: python launch/compare_kvpress.py --model models/demo

The same weights in `transformers`, the same prompts, every press and every cache of ours brought to
the same bytes. Needs the extra `kvpress`.
"""

import json
import logging
import os
import sys

from rich.console import Console

from pikv_megatron.benchmarks.kvpress.options import CompareOptions, parse_options
from pikv_megatron.inference.program import command, refuse
from pikv_megatron.inference.progress import progress

TABLE_WIDTH = 160  # where there is no terminal, rich would squeeze it into 80


def main() -> int:
    """Print, and write, what was measured."""
    os.environ.setdefault("WORLD_SIZE", "1")  # there is one rank, launched or not
    try:
        options = parse_options(sys.argv[1:])
        results = run(options)
    except ValueError as error:
        return refuse(error)
    from pikv_megatron.benchmarks.kvpress.report import report_json, report_picture, report_table

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(report_table(options, results))
    if options.output is not None:
        text = json.dumps(report_json(options, results, command()), indent=2)
        options.output.write_text(text + "\n")
    if options.picture is not None:
        options.picture.write_text(report_picture(options, results), encoding="utf-8")
    return 0


def run(options: CompareOptions) -> list:
    """Every contestant on every task; kvpress is imported here, as it may not be there."""
    try:
        from pikv_megatron.benchmarks.kvpress.contestants import entries
    except ImportError as error:
        raise ValueError(f"pip install pikv-megatron[kvpress] ({error})") from error
    from transformers import AutoModelForCausalLM

    from pikv_megatron.benchmarks.kvpress.report import Result
    from pikv_megatron.benchmarks.kvpress.trial import run as judged

    logging.getLogger("kvpress").setLevel(logging.ERROR)  # of models that it was not tested with
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    found = [("as computed", 1.0, 1.0, None)]
    found += [(entry.name, entry.budget, entry.keep, entry.press) for entry in entries(options)]
    results = []
    with progress("caches", is_shown=True) as advance:
        for number, (name, budget, keep, press) in enumerate(found, 1):
            advance(number - 1, len(found))
            try:
                scores = {task: judged(model, press, x) for task, x in options.tasks.items()}
            except ValueError as error:  # a press that does not fit the model
                print(f"{name} at {budget:g} is left out: {error}", file=sys.stderr)
                continue
            results.append(Result(name, budget, keep, scores))
    return results


if __name__ == "__main__":
    sys.exit(main())
