"""Tune by layer: python launch/tune.py --model DIR --pikv FILE [FILE ...] --share 0.1 --output FILE

Gives each cache to one layer after the other, the others being lossless, and says what it costs.
With `--share` every layer takes the cache that lets all lose least within so many bytes, and what
they lose together is measured. Takes the options of launch/evaluate.py.
"""

import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import replace

# What is not installed, and what will be renamed, would hide the tables.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")

from pikv_megatron import destroy_process_groups
from pikv_megatron.calibration.tune_options import TuneOptions, parse_tuning
from pikv_megatron.calibration.tuning import (
    Tuning,
    choose,
    costs,
    costs_table,
    held,
    one_by_one,
    tuned,
)
from pikv_megatron.evaluation.evaluator import LOSSLESS
from pikv_megatron.evaluation.measure import measure
from pikv_megatron.evaluation.report.tables import (
    Grid,
    TextTable,
    accuracy_table,
    cost_table,
    print_tables,
)
from pikv_megatron.inference.program import IS_FIRST_RANK, refuse, use_device


def main() -> int:
    """Run on every rank; the first one prints and writes what was chosen."""
    try:
        options = parse_tuning(sys.argv[1:])
        use_device()
        with redirect_stdout(sys.stderr):  # DeepSpeed prints what it builds
            tables = run(options)
    except ValueError as error:
        return refuse(error)
    if IS_FIRST_RANK:
        print_tables(tables)
    return 0


def run(options: TuneOptions) -> list[TextTable]:
    """Measure, choose, write, and measure what was chosen."""
    evaluate, num_layers = options.evaluate, options.evaluate.architecture.num_layers
    caches = evaluate.caches
    names = [name for name in caches if name != LOSSLESS]
    grid = measure(replace(evaluate, caches=one_by_one(caches, num_layers)))
    by_layer = costs(grid, names, num_layers)
    if options.share is None:
        return [costs_table(by_layer, None)]
    tuning = choose(by_layer, held(grid, LOSSLESS), options.share)
    pikv = tuned(caches, tuning)
    if options.output is not None and IS_FIRST_RANK:
        pikv.to_file(options.output)
    whole = measure(replace(evaluate, caches={LOSSLESS: caches[LOSSLESS], "tuned": pikv}))
    return [costs_table(by_layer, tuning), accuracy_table(whole), forecast(whole, tuning)]


def forecast(grid: Grid, tuning: Tuning) -> TextTable:
    """What the tuned cache costs, and what it should if layers' costs added up."""
    table = cost_table(grid)
    title = (
        f"{table.title}; added up, layers alone hold {tuning.held:.3f} of a dense cache at a KL of "
        f"{tuning.divergence:.4f}"
    )
    return replace(table, title=title)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        destroy_process_groups()
