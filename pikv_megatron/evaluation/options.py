"""The command line of `launch/evaluate.py`, checked before anything is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch

from pikv_megatron.cache.placement import Placement
from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.inference.arguments import ArgumentParser, default_dtype, positive, writable

MIN_LENGTH = 16  # one pair and one question


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate; every field was checked.

    Attributes:
        model: a Hugging Face directory.
        architecture: what its `config.json` describes.
        byte_ids: its tokenizer's ids of bytes.
        caches: the configurations by name.
        length: tokens of a sequence.
        num_questions: of the recall task, at least.
        num_texts: windows of text.
        dtype: type of weights and caches.
        output: file for all figures, JSON.
    """

    model: Path
    architecture: Architecture
    byte_ids: ByteIds
    caches: dict[str, PiKVConfig]
    length: int
    num_questions: int
    num_texts: int
    dtype: torch.dtype
    output: Path | None


def parse_options(argv: Sequence[str]) -> EvaluateOptions:
    """Read the command line and the small files that it names.

    Args:
        argv: without the program's name.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    args = _parser().parse_args(argv)
    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: there is no such directory")
    architecture = read_architecture(args.model)
    _check_length(args.length, architecture)
    return EvaluateOptions(
        model=args.model,
        architecture=architecture,
        byte_ids=ByteIds(Tokenizer.from_directory(args.model)),
        caches=_read_caches(args.pikv, args.length, architecture),
        length=args.length,
        num_questions=args.questions,
        num_texts=args.texts,
        dtype=DTYPES[args.dtype],
        output=writable(args.output),
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser("Measure what caches cost in quality beside the lossless one")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory, byte-level")
    add("--pikv", nargs="+", required=True, metavar="FILE",
        help="YAML files of caches, or names of presets")
    add("--length", type=positive(int), default=1024, help="tokens of a sequence; default: 1024")
    add("--questions", type=positive(int), default=192,
        help="of the recall task, rounded up to whole sequences; default: 192")
    add("--texts", type=positive(int), default=16, help="windows of text; default: 16")
    add("--dtype", choices=list(DTYPES), default=default_dtype(), help="default: %(default)s")
    add("--output", type=Path, help="all figures, JSON")
    return parser


def _check_length(length: int, architecture: Architecture) -> None:
    if not MIN_LENGTH <= length <= architecture.max_sequence_length:
        raise ValueError(
            f"--length {length} must lie between {MIN_LENGTH} and the model's longest sequence, "
            f"{architecture.max_sequence_length}"
        )
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if architecture.num_experts % num_ranks:
        raise ValueError(
            f"{num_ranks} ranks were launched: their number must divide the model's "
            f"{architecture.num_experts} experts"
        )


def _read_caches(
    names: Sequence[str], length: int, architecture: Architecture
) -> dict[str, PiKVConfig]:
    caches: dict[str, PiKVConfig] = {}
    for text in names:
        name, pikv = Path(text).stem, read_cache(text)
        if name in caches:
            raise ValueError(f"--pikv {text}: another one is called {name}, too; rename one")
        if length > (pikv.max_sequence_length or length):
            raise ValueError(
                f"--pikv {text}: max_sequence_length {pikv.max_sequence_length} is less than "
                f"--length {length}"
            )
        if pikv.replicas > architecture.moe_router_topk:
            raise ValueError(
                f"--pikv {text}: replicas {pikv.replicas} must not exceed the "
                f"{architecture.moe_router_topk} experts that the model chooses for a token"
            )
        Placement.resolve(pikv, int(os.environ.get("WORLD_SIZE", "1")))
        caches[name] = pikv
    return caches


def read_cache(text: str) -> PiKVConfig:
    """A name without a suffix is a preset's, unless there is such a file."""
    if Path(text).exists() or Path(text).suffix:
        return PiKVConfig.from_file(text)
    return PiKVConfig(preset=text)
