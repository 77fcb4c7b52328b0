"""The command line of `launch/evaluate.py`, checked before anything is loaded."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.byte_ids import is_bytewise
from pikv_megatron.evaluation.caches import num_ranks, read_caches
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.base import Source
from pikv_megatron.evaluation.tasks.registry import TASKS
from pikv_megatron.inference.arguments import ArgumentParser, default_dtype, positive


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate; every field was checked.

    Attributes:
        model: a Hugging Face directory.
        architecture: what its `config.json` describes.
        source: what tasks are made of.
        caches: the configurations by name, first a lossless one that the others are judged by.
        tasks: names.
        length: tokens of a sequence.
        samples: sequences of a task; None: as many as the task is used to.
        seed: of the tasks.
        batch_size: sequences of all ranks that are fed at once.
        dtype: type of weights and caches.
        out: folder for the results and the report; None: they are printed only.
    """

    model: Path
    architecture: Architecture
    source: Source
    caches: dict[str, PiKVConfig]
    tasks: tuple[str, ...]
    length: int
    samples: int | None
    seed: int
    batch_size: int
    dtype: torch.dtype
    out: Path | None

    def build(self, task: str) -> list[Task]:
        """The sequences of a task."""
        kind = TASKS[task]
        return kind.build(self.source, self.length, self.samples or kind.num_samples, self.seed)


def parse_options(argv: Sequence[str]) -> EvaluateOptions:
    """Read the command line and the small files that it names.

    Args:
        argv: without the program's name.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    parser = argument_parser("Measure what caches cost in quality beside the lossless one")
    return read_options(parser.parse_args(argv))


def read_options(args: Namespace) -> EvaluateOptions:
    """What `argument_parser` was told, and the small files that it names; see `parse_options`."""
    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: there is no such directory")
    architecture = read_architecture(args.model)
    _check_length(args.length, architecture)
    for option in ("text", "lines"):
        path = getattr(args, option)
        if path is not None and not path.is_file():
            raise ValueError(f"--{option} {path}: there is no such file")
    if args.out is not None and (args.out.is_file() or not os.access(_parent(args.out), os.W_OK)):
        raise ValueError(f"--out {args.out}: cannot write a folder there")
    tokenizer = Tokenizer.from_directory(args.model)
    source = Source(tokenizer, is_bytewise(tokenizer), args.text, args.lines)
    return EvaluateOptions(
        model=args.model,
        architecture=architecture,
        source=source,
        caches=read_caches(args.pikv, args.shares, args.length, architecture),
        tasks=_tasks(args.tasks, source),
        length=args.length,
        samples=args.samples,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=DTYPES[args.dtype],
        out=args.out,
    )


def argument_parser(purpose: str) -> ArgumentParser:
    """Of a program that measures caches on tasks."""
    parser = ArgumentParser(purpose)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add("--pikv", nargs="+", required=True, metavar="FILE",
        help="YAML files of caches, or names of presets")
    add("--shares", nargs="+", type=positive(float), default=[], metavar="SHARE",
        help="each cache is run at each of these shares of what its method spends, shards that are "
        "visited, pages that are read or pages that stay; one that spends no share is run once")
    add("--tasks", nargs="+", metavar="NAME",
        help=f"of {', '.join(TASKS)}; default: all that fit the model")
    add("--out", type=Path, metavar="DIR",
        help="folder for results.json, report.md, report.html and held.svg, memory against "
        "accuracy; what is there is not run again")
    add("--length", type=positive(int), default=1024, help="tokens of a sequence; default: 1024")
    add("--samples", type=positive(int), help="sequences of a task; default: 8, recall 24, text 16")
    add("--seed", type=int, default=0, help="of the tasks; default: 0")
    add("--batch-size", type=positive(int), default=16,
        help="sequences that are fed at once; default: 16")
    add("--text", type=Path, metavar="FILE",
        help="for perplexity; default: sources of Python's library that the demo model never saw")
    add("--lines", type=Path, metavar="FILE",
        help="JSON lines with context, input and answers, as LongBench has them")
    add("--dtype", choices=list(DTYPES), default=default_dtype(), help="default: %(default)s")
    return parser


def _parent(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.is_dir())


def _check_length(length: int, architecture: Architecture) -> None:
    if length > architecture.max_sequence_length:
        raise ValueError(
            f"--length {length} exceeds the model's longest sequence, "
            f"{architecture.max_sequence_length}"
        )
    if architecture.num_experts % num_ranks():
        raise ValueError(
            f"{num_ranks()} ranks were launched: their number must divide the model's "
            f"{architecture.num_experts} experts"
        )


def _tasks(names: Sequence[str] | None, source: Source) -> tuple[str, ...]:
    if names is None:
        return tuple(name for name, kind in TASKS.items() if kind.unfit(source) is None)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks {name}: the tasks are {', '.join(TASKS)}")
        reason = TASKS[name].unfit(source)
        if reason is not None:
            raise ValueError(f"--tasks {name}: it {reason}")
    return tuple(dict.fromkeys(names))
