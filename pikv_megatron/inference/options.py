"""The command line of `launch/generate.py`, checked before anything is loaded."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from pydantic import ValidationError

from pikv_megatron.cache.placement import Placement
from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.generation_config import sampling_defaults
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.config import PiKVConfig
from pikv_megatron.inference.arguments import (
    ArgumentParser,
    default_dtype,
    joined_values,
    positive,
    text,
    writable,
)
from pikv_megatron.inference.prompts import encode_prompts, read_prompts
from pikv_megatron.inference.sampling import SamplingParams

SAMPLING_FIELDS = tuple(SamplingParams.model_fields)
TEXT_OPTIONS = ("--prompt", "--stop")  # their value may begin with a dash


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate, and on which ranks; every field was checked.

    Attributes:
        model: a Hugging Face directory.
        architecture: what its `config.json` describes.
        tokenizer: of that directory.
        pikv: the cache.
        deepspeed: `init_inference`'s configuration, with the type of the weights.
        prompts: texts, in order.
        prompt_ids: their tokens.
        max_new_tokens: most tokens to generate for each.
        sampling: how tokens are chosen.
        stop_strings: texts that end a sequence.
        dtype: type of weights and cache.
        output: file for the results, one JSON object a line.
        expert_parallel_size: ranks that share the experts and the cache.
        tensor_parallel_size: ranks that share the attention heads.
        timeout: seconds after which a rank that waits for another gives up.
    """

    model: Path
    architecture: Architecture
    tokenizer: Tokenizer
    pikv: PiKVConfig
    deepspeed: dict[str, Any]
    prompts: list[str]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    sampling: SamplingParams
    stop_strings: list[str]
    dtype: torch.dtype
    output: Path | None
    expert_parallel_size: int
    tensor_parallel_size: int
    timeout: float


def parse_options(argv: Sequence[str], deepspeed_config: Path) -> GenerateOptions:
    """Read the command line and the small files that it names.

    Args:
        argv: without the program's name.
        deepspeed_config: the default of `--deepspeed-config`.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    parser = _parser(deepspeed_config)
    args = parser.parse_args(joined_values(parser, argv, TEXT_OPTIONS))
    architecture, tokenizer = _read_model(args.model)
    pikv = PiKVConfig.from_file(args.pikv) if args.pikv else PiKVConfig()
    expert_parallel_size = _expert_parallel_size(args, architecture)
    Placement.resolve(pikv, expert_parallel_size)
    prompts = read_prompts(args.prompt, args.prompt_file)
    options = GenerateOptions(
        model=args.model,
        architecture=architecture,
        tokenizer=tokenizer,
        pikv=pikv,
        deepspeed={**_read_deepspeed_config(args.deepspeed_config), "dtype": DTYPES[args.dtype]},
        prompts=[prompt for _, prompt in prompts],
        prompt_ids=encode_prompts(
            prompts, tokenizer, args.model if args.chat else None, args.special_tokens,
            architecture.vocab_size,
        ),
        max_new_tokens=args.max_new_tokens,
        sampling=_sampling(args),
        stop_strings=args.stop,
        dtype=DTYPES[args.dtype],
        output=writable(args.output),
        expert_parallel_size=expert_parallel_size,
        tensor_parallel_size=args.tensor_parallel_size,
        timeout=args.timeout,
    )
    _check_lengths(options)
    return options


def _parser(deepspeed_config: Path) -> ArgumentParser:
    parser = ArgumentParser(
        "Generate text; run it with: deepspeed --num_accelerators N launch/generate.py"
    )
    add = parser.add_argument
    add("--model", type=Path, required=True,
        help=f"Hugging Face directory: {', '.join(FAMILIES)}")
    add("--pikv", type=Path, help="YAML file of the cache; default: lossless")
    add("--prompt", action="append", type=text, default=[],
        help="text to continue; may be repeated")
    add("--prompt-file", type=Path, help="more texts, one a line (UTF-8)")
    add("--chat", action="store_true", help="each text is a user's message: put it into the "
        "model's chat template")
    add("--no-special-tokens", action="store_false", dest="special_tokens",
        help="texts hold their special tokens already: put none around them")
    add("--max-new-tokens", type=positive(int), default=64, help="for each text; default: 64")
    add("--temperature", type=float, help="0 takes the likeliest token; default of this and the "
        "next three: the model's generation_config.json, else 0")
    add("--top-k", type=int, help="draw among the k likeliest; 0: all")
    add("--top-p", type=float, help="draw among the likeliest p; 1: all")
    add("--repetition-penalty", type=float, help="above 1 repeats less; 1: none")
    add("--seed", type=int, help="of the draws; default: 0")
    add("--stop", action="append", type=text, default=[],
        help="text that ends a sequence; may be repeated")
    add("--dtype", choices=list(DTYPES), default=default_dtype(), help="default: %(default)s")
    add("--output", type=Path, help="results, one JSON object a line")
    add("--expert-parallel-size", type=positive(int), help="default: all ranks left by the next")
    add("--tensor-parallel-size", type=positive(int), default=1, help="default: 1")
    add("--timeout", type=positive(float), default=300.0, help="seconds to wait for a rank; "
        "default: 300")
    add("--deepspeed-config", type=Path, default=deepspeed_config, help="of init_inference")
    return parser


def _read_model(directory: Path) -> tuple[Architecture, Tokenizer]:
    if not directory.is_dir():
        raise ValueError(f"--model {directory}: there is no such directory")
    architecture = read_architecture(directory)
    tokenizer = Tokenizer.from_directory(directory)
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"--model {directory}: there is no *.safetensors file in it")
    return architecture, tokenizer


def _expert_parallel_size(args: argparse.Namespace, architecture: Architecture) -> int:
    world_size, tensor = int(os.environ.get("WORLD_SIZE", "1")), args.tensor_parallel_size
    size = args.expert_parallel_size or max(1, world_size // tensor)
    if world_size % (size * tensor):
        raise ValueError(
            f"--expert-parallel-size {size} times --tensor-parallel-size {tensor} must divide the "
            f"{world_size} ranks that were launched"
        )
    if architecture.num_experts % size:
        raise ValueError(
            f"--expert-parallel-size {size} must divide the model's "
            f"{architecture.num_experts} experts"
        )
    if architecture.num_query_groups % tensor:
        raise ValueError(
            f"--tensor-parallel-size {tensor} must divide the model's "
            f"{architecture.num_query_groups} key-value heads"
        )
    return size


def _sampling(args: argparse.Namespace) -> SamplingParams:
    if "" in args.stop:
        raise ValueError("--stop is empty")
    given = {field: getattr(args, field) for field in SAMPLING_FIELDS}
    given = {field: value for field, value in given.items() if value is not None}
    try:
        return SamplingParams(**sampling_defaults(args.model) | given)
    except ValidationError as error:
        first = error.errors()[0]
        field = first["loc"][0]
        option = "--" + field.replace("_", "-")
        name = option if field in given else f"{args.model / 'generation_config.json'}: {field}"
        raise ValueError(f"{name} {first['input']}: {first['msg']}") from error


def _read_deepspeed_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed-config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed-config {path}: expected a JSON object")
    return config


def _check_lengths(options: GenerateOptions) -> None:
    capacity = options.pikv.max_sequence_length or options.architecture.max_sequence_length
    for i, ids in enumerate(options.prompt_ids):
        if not ids:
            raise ValueError(f"prompt {i + 1} has no tokens")
        if len(ids) + options.max_new_tokens - 1 > capacity:  # the last one is never fed
            raise ValueError(
                f"prompt {i + 1} has {len(ids)} tokens: with --max-new-tokens "
                f"{options.max_new_tokens} it exceeds max_sequence_length, {capacity}"
            )
