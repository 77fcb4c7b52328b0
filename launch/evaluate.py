"""Measure quality: python launch/evaluate.py --model models/demo --pikv FILE [FILE ...]

The same under deepspeed --num_accelerators N with N ranks, over which sequences are dealt.
"""

import sys
import warnings
from contextlib import redirect_stdout

# What is not installed, and what will be renamed, would hide the table.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

from pikv_megatron import destroy_process_groups
from pikv_megatron.evaluation.measure import measure, provenance
from pikv_megatron.evaluation.options import EvaluateOptions, parse_options
from pikv_megatron.evaluation.report.page import cost_pictures, html_report
from pikv_megatron.evaluation.report.tables import Grid, accuracy_table, cost_table, print_tables
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device


def main() -> int:
    """Run on every rank; the first one prints and writes what was measured."""
    try:
        options = parse_options(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            grid = measure(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        show(options, grid)
    return 0


def show(options: EvaluateOptions, grid: Grid) -> None:
    """Print the tables, and write the report beside the results."""
    tables = accuracy_table(grid), cost_table(grid)
    print_tables(tables)
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
