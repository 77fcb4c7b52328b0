"""The command line of `launch/compare_kvpress.py`, checked before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pikv_megatron.calibrated import load_calibrated
from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.byte_ids import is_bytewise
from pikv_megatron.evaluation.caches import read_cache
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.base import Source
from pikv_megatron.evaluation.tasks.registry import TASKS
from pikv_megatron.inference.arguments import ArgumentParser, positive, writable

# Presses drop a share of the tokens, and hold the others as computed.
PRESSES = ("SnapKV", "ExpectedAttention", "KVzip", "StreamingLLM")
POLICIES = ("snapkv", "h2o", "streaming")


@dataclass(frozen=True)
class CompareOptions:
    """What to compare; every field was checked.

    Attributes:
        model: a Hugging Face directory.
        architecture: what its `config.json` describes.
        tasks: built, by name.
        length: tokens of a sequence.
        budgets: shares of the bytes of a cache as computed.
        presses: of kvpress, which are brought to the budgets.
        caches: of the user's, by name, which take part as they are.
        policies: of ours, which are brought to the budgets.
        dtype: type of weights and caches.
        calibration: file of `launch/calibrate.py`, for policies of ours that need one; None: they
            take no part.
        output: file for all figures, JSON.
        picture: file for accuracy against bytes, SVG.
    """

    model: Path
    architecture: Architecture
    tasks: dict[str, list[Task]]
    length: int
    budgets: tuple[float, ...]
    presses: tuple[str, ...]
    caches: dict[str, PiKVConfig]
    policies: tuple[str, ...]
    dtype: torch.dtype
    calibration: Path | None
    output: Path | None
    picture: Path | None

    @property
    def shortest_prompt(self) -> int:
        """Tokens, of which a cache's fixed bytes are the largest share."""
        return min(part.prompt_len for parts in self.tasks.values() for part in parts)


def parse_options(argv: Sequence[str]) -> CompareOptions:
    """Read the command line and the small files that it names.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    args = _parser().parse_args(argv)
    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: there is no such directory")
    tokenizer = Tokenizer.from_directory(args.model)
    source = Source(tokenizer, is_bytewise(tokenizer))
    names = args.tasks or [
        name for name, kind in TASKS.items() if kind.is_scored and kind.unfit(source) is None
    ]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks {name} is unknown: the tasks are {', '.join(TASKS)}")
        if TASKS[name].unfit(source):
            raise ValueError(f"--tasks {name}: {TASKS[name].unfit(source)}")
    if args.calibration is not None:
        load_calibrated(args.calibration)
    for budget in args.budgets:
        if not 0 < budget < 1:
            raise ValueError(f"--budgets {budget} must lie between 0 and 1")
    for option, known in (("presses", PRESSES), ("policies", POLICIES)):
        for name in getattr(args, option):
            if name not in known:
                raise ValueError(f"--{option} {name}: they are {', '.join(known)}")
    return CompareOptions(
        model=args.model,
        architecture=read_architecture(args.model),
        tasks={
            name: TASKS[name].build(
                source, args.length, args.samples or TASKS[name].num_samples, args.seed
            )
            for name in names
        },
        length=args.length,
        budgets=tuple(args.budgets),
        presses=tuple(args.presses),
        caches={Path(text).stem: read_cache(text) for text in args.pikv},
        policies=tuple(args.policies),
        dtype=DTYPES[args.dtype],
        calibration=args.calibration,
        output=writable(args.output),
        picture=writable(args.picture, "--picture"),
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser("Compare retention and codecs with the presses of NVIDIA kvpress")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add("--tasks", nargs="+", metavar="NAME", help="default: all that are scored and fit")
    add("--length", type=positive(int), default=1024, help="tokens of a sequence; default: 1024")
    add("--samples", type=positive(int), help="sequences of a task; default: the task's own")
    add("--seed", type=int, default=0, help="of the tasks; default: 0")
    add("--budgets", nargs="+", type=float, default=[0.5, 0.25, 0.125], metavar="SHARE",
        help="of the bytes of a cache as computed; default: 0.5 0.25 0.125")
    add("--presses", nargs="*", default=PRESSES, metavar="NAME",
        help=f"of kvpress; default: {' '.join(PRESSES)}")
    add("--pikv", nargs="+", default=[], metavar="FILE",
        help="YAML files of caches, or names of presets, that take part as they are, at the bytes "
        "that they hold")
    add("--policies", nargs="*", default=POLICIES, metavar="NAME",
        help=f"of ours that are brought to the budgets; default: {' '.join(POLICIES)}")
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="default: %(default)s")
    add("--calibration", type=Path, help="file of launch/calibrate.py: with it our policy "
        "token_eviction, which is calibrated, takes part")
    add("--output", type=Path, help="all figures, JSON")
    add("--picture", type=Path, help="accuracy against bytes, SVG")
    return parser
