"""The command line of `launch/benchmark.py`, checked before anything is built."""

import argparse
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

import torch
import yaml

from pikv_megatron.benchmarks.model.caches import flush_interval, read_caches
from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.arguments import ArgumentParser, default_dtype, positive, writable

DEFAULT_FLUSHES = 4
# Steps whose operator calls are counted: the first one behind a flush lists anew what it reads.
COUNTED_STEPS = 2
DEFAULT_CONTEXTS = 1024, 8192, 32768
# From 16 to 8,192 tokens, each 1.5 times as long as the one before.
DEFAULT_LENGTHS = tuple(round(16 * 512 ** (i / 15)) for i in range(16))
DEFAULT_PROMPTS = 2048, 8192, 16384, 32768
GROUPED, SDPA, STOCK = "dense, grouped product", "dense, SDPA", "stock Megatron"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure; every field was checked.

    Attributes:
        architecture: of the model.
        checkpoint: Hugging Face directory of its weights; None: they are random.
        pikv: the caches, by name.
        contexts: tokens in the cache before the first step, one measurement each.
        lengths: the same of every sequence of a mixed batch; none: no such batch is measured.
        prompts: tokens of prompts to time; none: no prompt is timed.
        beside_transformers: Hugging Face's own model is a contestant, too.
        batch_sizes: sequences on all ranks; each is measured behind every context.
        steps: timed steps, whole flush intervals.
        dtype: type of weights and caches.
        threads: of each rank; None: its share of the cores.
        clock: "wall", or "cpu": the processor's time for a rank, the mean over ranks.
        output: file for all figures, JSON.
        seed: of weights, keys, values and tokens.
    """

    architecture: Architecture
    checkpoint: Path | None
    pikv: Mapping[str, PiKVConfig]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    beside_transformers: bool
    batch_sizes: tuple[int, ...]
    steps: int
    dtype: torch.dtype
    threads: int | None
    clock: str
    output: Path | None
    seed: int

    @property
    def names(self) -> list[str]:
        """The contestants, as they are shown; the first one's logits are the reference."""
        last = [STOCK, TRANSFORMERS] if self.beside_transformers else [STOCK]
        return [GROUPED, SDPA, *self.pikv, *last]

    @property
    def flush_interval(self) -> int:
        """Steps after which every cache has flushed a whole number of times."""
        return flush_interval(self.pikv)

    @property
    def extra_steps(self) -> int:
        """Steps before the timed ones, and again behind them, where attention is timed."""
        return self.flush_interval

    @property
    def metered_steps(self) -> int:
        """Steps whose traffic is counted: none on one rank."""
        return 0 if _is_one_rank() else self.flush_interval

    @property
    def num_steps(self) -> int:
        """All steps of a contestant at one context length."""
        return self.steps + 2 * self.extra_steps + COUNTED_STEPS + self.metered_steps


def parse_options(argv: Sequence[str], configs: Path) -> BenchmarkOptions:
    """Read the command line and the files that it names.

    Args:
        argv: without the program's name.
        configs: folder of the default files.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    args = _parser(configs).parse_args(argv)
    pikv = read_caches(args.pikv, (GROUPED, SDPA, STOCK, TRANSFORMERS))
    is_default = args.lengths is None and args.prompts is None
    options = BenchmarkOptions(
        architecture=_read_architecture(args.model),
        checkpoint=args.model if args.model.is_dir() else None,
        pikv=pikv,
        contexts=tuple(args.contexts or (DEFAULT_CONTEXTS if is_default else ())),
        lengths=() if args.lengths is None else tuple(args.lengths) or DEFAULT_LENGTHS,
        prompts=_prompts(args.prompts),
        beside_transformers=_beside_transformers(args),
        batch_sizes=tuple(args.batch_size),
        steps=_steps(args.steps, flush_interval(pikv)),
        dtype=DTYPES[args.dtype],
        threads=args.threads,
        clock=_clock(args),
        output=writable(args.output),
        seed=args.seed,
    )
    _check_lengths(options)
    return options


def _parser(configs: Path) -> ArgumentParser:
    parser = ArgumentParser(
        "Time decoding over PiKV caches, over dense ones, and in stock Megatron. Under "
        "deepspeed --num_accelerators N the ranks share experts and sequences."
    )
    add = parser.add_argument
    add("--model", type=Path, default=configs / "model/benchmark.yaml",
        help="YAML file of the model, which gets random weights, or its Hugging Face directory; "
        "default: configs/model/benchmark.yaml")
    add("--pikv", nargs="+", default=["lossless"], help="caches, each a contestant: names of "
        "presets, or YAML files of your own; default: lossless")
    add("--contexts", type=positive(int), nargs="+", help="cached tokens before the first step; "
        "default: 1024 8192 32768, or none with --lengths or --prompts")
    add("--lengths", type=positive(int), nargs="*", help="measure a batch of sequences with so "
        "many cached tokens, and what each costs among its equals; without numbers: 16 sequences "
        "from 16 to 8192")
    add("--prompts", type=positive(int), nargs="*", help="time prompts of so many tokens, and "
        "measure the memory that they need; without numbers: 2048 8192 16384 32768")
    add("--transformers", action="store_true", help="Hugging Face's transformers takes part, on "
        "the same weights; one rank")
    add("--batch-size", type=positive(int), nargs="+", default=[1], help="sequences on all ranks, "
        "each behind every one of --contexts; default: 1")
    add("--steps", type=positive(int), help="timed steps, a multiple of flush_interval; "
        f"default: {DEFAULT_FLUSHES} of them")
    add("--dtype", choices=list(DTYPES), default=default_dtype(), help="default: %(default)s")
    add("--threads", type=positive(int), help="of each rank; default: its share of the cores")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the processor's time for "
        "a rank, the mean over ranks, without what it waits; with --threads 1; default: wall")
    add("--output", type=Path, help="all figures, JSON")
    add("--seed", type=seed_number, default=0, help="of weights and tokens; default: 0")
    return parser


def seed_number(text: str) -> int:
    """The `type` of an option that seeds a generator."""
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^31 - 1, got {text}")
    return int(text)


seed_number.__name__ = "int"  # argparse names it in its own message


def _read_architecture(path: Path) -> Architecture:
    try:
        found = read_architecture(path) if path.is_dir() else Architecture.from_yaml(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"--model {path}: {error}") from error
    if found.latent_attention is not None:
        raise ValueError(
            f"--model {path}: latent attention is not timed, the contexts that are drawn have keys "
            "and values apart"
        )
    return found


def _steps(steps: int | None, flush_interval: int) -> int:
    if steps is None:
        return DEFAULT_FLUSHES * flush_interval
    if steps % flush_interval:
        raise ValueError(
            f"--steps {steps} must be a multiple of flush_interval {flush_interval}: a mean over "
            "part of an interval would miss or overstate the flush"
        )
    return steps


def _clock(args: argparse.Namespace) -> str:
    if args.clock == "cpu" and (args.threads != 1 or torch.cuda.is_available()):
        raise ValueError(
            "--clock cpu needs --threads 1 and no accelerator: it adds up the time of threads, and "
            "stands still while a device works"
        )
    return args.clock


def _beside_transformers(args: argparse.Namespace) -> bool:
    if args.transformers and importlib.util.find_spec("transformers") is None:
        raise ValueError("--transformers: the package is not installed; pip install transformers")
    if args.transformers and not _is_one_rank():
        raise ValueError("--transformers is for one rank: leave out the launcher")
    return args.transformers


def _prompts(prompts: Sequence[int] | None) -> tuple[int, ...]:
    if prompts is None:
        return ()
    if not _is_one_rank():
        raise ValueError("--prompts is for one rank: leave out the launcher")
    return tuple(prompts) or DEFAULT_PROMPTS


def _is_one_rank() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _check_lengths(options: BenchmarkOptions) -> None:
    limits = [options.architecture, *options.pikv.values()]
    capacity = min(one.max_sequence_length for one in limits if one.max_sequence_length is not None)
    for length in options.prompts:
        if length > capacity:
            raise ValueError(f"--prompts {length} exceeds max_sequence_length {capacity}")
    for flag, lengths in (("--contexts", options.contexts), ("--lengths", options.lengths)):
        for length in lengths:
            if length + options.num_steps > capacity:
                raise ValueError(
                    f"{flag} {length}: with the {options.num_steps} tokens that are decoded behind "
                    f"it, it exceeds max_sequence_length {capacity}"
                )
