"""The command line of `launch/tune.py`, checked before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pikv_megatron.evaluation.options import EvaluateOptions, argument_parser, read_options
from pikv_megatron.inference.arguments import positive, writable


class TuneOptions(NamedTuple):
    """What to choose from, and for how much.

    Attributes:
        evaluate: the caches, and what they are measured on.
        share: bytes that the tuned cache may hold, over a dense one's in bfloat16; None: nothing is
            chosen.
        output: the file to write; None: none.
    """

    evaluate: EvaluateOptions
    share: float | None
    output: Path | None


def parse_tuning(argv: Sequence[str]) -> TuneOptions:
    """Read the command line and the small files that it names.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    parser = argument_parser("Choose a cache for every layer by what it costs in that one alone")
    parser.add_argument("--share", type=positive(float), metavar="SHARE",
                        help="of a dense cache's bytes, in bfloat16, that the tuned one may hold: "
                        "1/6 is 0.167; default: costs are printed, and nothing is chosen")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="YAML file for the tuned cache")
    args = parser.parse_args(argv)
    if args.output is not None and args.share is None:
        raise ValueError("--output: nothing is chosen without --share; name both")
    output = writable(args.output)
    return TuneOptions(read_options(args), args.share, output)
