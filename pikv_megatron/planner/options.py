"""The command line of the planner."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.huggingface_config import architecture_of, read_architecture
from pikv_megatron.checkpoint.json_file import read_json
from pikv_megatron.evaluation.caches import read_cache
from pikv_megatron.inference.arguments import ArgumentParser, positive
from pikv_megatron.planner.hardware import Hardware
from pikv_megatron.planner.plan import Plan
from pikv_megatron.planner.target import Target
from pikv_megatron.planner.weights import Weights

ROOFS = {
    "memory_bandwidth": "bytes a second of a rank's memory",
    "compute": "operations a second of a rank",
    "fabric_bandwidth": "bytes a second that a rank sends",
    "fabric_latency": "seconds of an empty collective",
    "host_bandwidth": "bytes a second from the host's memory to a rank's",
}


def parse_options(argv: Sequence[str]) -> tuple[Plan, bool]:
    """The plan that is asked for, and whether it is asked for as JSON.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    args = _parser().parse_args(argv)
    architecture = _architecture(args.model)
    dtype = DTYPES[args.dtype or architecture.dtype]
    target = Target(
        architecture, read_cache(args.pikv), args.expert_parallel, args.batch,
        args.context or architecture.max_sequence_length, args.new_tokens, dtype,
    )
    roofs = {name: value for name in ROOFS if (value := getattr(args, name)) is not None}
    hardware = replace(Hardware.h100(args.expert_parallel), **roofs)
    weights = Weights.of(architecture, dtype)
    return Plan(target, args.memory, args.workspace, hardware, weights), args.json


def _parser() -> ArgumentParser:
    parser = ArgumentParser("What a cache takes on every rank, before any is started")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory, or a config.json alone")
    add("--pikv", default="lossless", metavar="FILE",
        help="YAML file of a cache, or name of a preset; default: lossless")
    add("--memory", type=_bytes, default=ByteSize(80 * 10**9), help="of a rank; default: 80GB")
    add("--workspace", type=_bytes, default=ByteSize(4 * 10**9),
        help="of it, for activations, communication and the runtime; default: 4GB")
    add("--expert-parallel", type=positive(int), default=1, metavar="RANKS", help="default: 1")
    add("--context", type=_count, help="tokens of a sequence in the end, 128K say; default: most")
    add("--new-tokens", type=_count, default=256, help="of them, that are decoded; default: 256")
    add("--batch", type=positive(int), default=1, help="sequences of all ranks; default: 1")
    add("--dtype", choices=list(DTYPES), help="default: the model's")
    for name, what in ROOFS.items():
        add(f"--{name.replace('_', '-')}", type=positive(float),
            help=f"{what}; default: an H100's, see planner/hardware.py")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _architecture(path: Path) -> Architecture:
    if path.is_dir():
        return read_architecture(path)
    if not path.is_file():
        raise ValueError(f"--model {path}: there is no such directory or file")
    try:
        return architecture_of(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 80GB or 80GiB, say") from None


def _count(text: str) -> int:
    """`128K` is 131,072."""
    found = re.fullmatch(r"(\d+)([KM]?)", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: 4096 or 128K, say")
    return int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2].upper()]
