"""Times every operation: python -m pikv_megatron.benchmarks.ops.run.

Before an operation is timed, its result on the very inputs that are timed is compared with a
plain float64 computation of the same thing. Where it is off by more than its types allow, the
operation is refused: no figure of it is reported, the reason is printed, and the exit status is 1.
This rule needs no tests folder, so that an installed package measures as the repository does.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch
from rich.console import Console

from pikv_megatron.benchmarks.ops.op_case import Grid
from pikv_megatron.benchmarks.ops.op_cases import CASES
from pikv_megatron.benchmarks.ops.op_report import check_plot, op_json, op_table, plot
from pikv_megatron.benchmarks.ops.op_result import OpResult, WrongResult, measure_case
from pikv_megatron.benchmarks.ops.op_timer import (
    COPY_BYTES,
    QUICK_COPY_BYTES,
    OpTimer,
    copy_bandwidth,
)
from pikv_megatron.benchmarks.model.options import seed_number
from pikv_megatron.checkpoint.architecture import DTYPES
from pikv_megatron.inference.arguments import ArgumentParser, positive, writable
from pikv_megatron.inference.progress import progress

BAD_INPUT = 2
ROUNDS, QUICK_ROUNDS, SECONDS = 30, 5, 2.5


@dataclass(frozen=True)
class RunOptions:
    """The command line, checked.

    Attributes:
        ops: names in `CASES`.
        grid: the sizes.
        is_quick: fewer calls and a smaller copy, for a first look.
        output: file for all figures, JSON.
        plot: file for the plot.
    """

    ops: tuple[str, ...]
    grid: Grid
    is_quick: bool
    output: Path | None
    plot: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if an operation was refused, 2 if an option is."""
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True, highlight=False)
    try:
        options = parse_options(argv)
    except ValueError as error:
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return BAD_INPUT
    results, refused, bandwidth = run(options)
    Console(width=max(140, Console().width)).print(op_table(results, bandwidth))
    command = shlex.join(["python", "-m", "pikv_megatron.benchmarks.ops.run", *argv])
    if options.output is not None:
        report = op_json(results, refused, bandwidth, command, options.grid.seed)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(results, options.plot)
    for reason in refused.values():
        errors.print(f"refused: {reason}", markup=False, soft_wrap=True)
    return 1 if refused else 0


def run(options: RunOptions) -> tuple[list[OpResult], dict[str, str], float]:
    """Figures of all cases, why operations were refused, and the copy's bytes per second."""
    rounds = QUICK_ROUNDS if options.is_quick else ROUNDS
    timer = OpTimer(options.grid.device, rounds, SECONDS)
    bandwidth = copy_bandwidth(timer, QUICK_COPY_BYTES if options.is_quick else COPY_BYTES)
    results: list[OpResult] = []
    refused: dict[str, str] = {}
    for name in options.ops:
        with progress(name, is_shown=True):
            try:
                # The cases of an operation share memory: each is measured before the next is made.
                results += [
                    measure_case(case, timer, bandwidth) for case in CASES[name](options.grid)
                ]
            except WrongResult as error:
                refused[name] = str(error)
    return results, refused, bandwidth


def parse_options(argv: Sequence[str]) -> RunOptions:
    """Read the command line, and set the number of threads.

    Raises:
        ValueError: with one line that names the option and says what is wrong.
    """
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; use --device cpu")
    _check_sizes(args.tokens, args.page_sizes)
    check_plot(args.plot)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    grid = Grid(
        tuple(args.tokens), tuple(args.page_sizes), tuple(DTYPES[name] for name in args.dtypes),
        torch.device(args.device), args.seed,
    )
    return RunOptions(tuple(args.ops), grid, args.quick, writable(args.output), args.plot)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("Time every operation and payload, beside a copy and dense attention.")
    add = parser.add_argument
    add("--ops", nargs="+", choices=list(CASES), default=list(CASES), help="default: all of them")
    add("--tokens", nargs="+", type=positive(int), default=[16384, 65536],
        help="cached tokens; default: 16384 65536")
    add("--page-sizes", nargs="+", type=positive(int), default=[16, 64],
        help="tokens a page; default: 16 64")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"],
        help="of queries and plain pages; queries over scaled pages have the first; default: "
        "float32 bfloat16")
    add("--threads", type=positive(int), help="of a CPU; default: torch's")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s")
    add("--output", type=Path, help="all figures, JSON")
    add("--plot", type=Path, help="bars, PNG or any other format of matplotlib")
    add("--quick", action="store_true", help="fewer calls: a first look, not figures to publish")
    add("--seed", type=seed_number, default=0, help="of all inputs; default: 0")
    return parser


def _check_sizes(tokens: Sequence[int], page_sizes: Sequence[int]) -> None:
    for page_size in page_sizes:
        if page_size % 8:
            raise ValueError(
                f"--page-sizes {page_size}: must be a multiple of 8, the tokens that int3 packs "
                "together"
            )
        for num_tokens in tokens:
            if num_tokens % (8 * page_size):
                raise ValueError(
                    f"--tokens {num_tokens}: must be a multiple of 8 pages of {page_size}, "
                    "because 1/8 of the pages is read"
                )


if __name__ == "__main__":
    sys.exit(main())
