"""The command lines of `launch/calibrate.py` and `launch/allocate.py`, checked before anything is
loaded."""

import argparse
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Sequence

import torch

from pikv_megatron.calibration.text import windows
from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.fingerprint import fingerprint
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.config import PiKVConfig
from pikv_megatron.demo.corpus import stdlib_sources
from pikv_megatron.evaluation.byte_ids import is_bytewise
from pikv_megatron.evaluation.caches import read_cache
from pikv_megatron.inference.arguments import (
    ArgumentParser,
    default_dtype,
    positive,
    share,
    writable,
)


@dataclass(frozen=True)
class CalibrateOptions:
    """What to calibrate with; every field was checked.

    Attributes:
        model: a Hugging Face directory.
        architecture: what its `config.json` describes.
        ids: [windows, length], int64, windows of the text.
        recall: share of them that are pairs to recall.
        dtype: type of weights and caches.
        output: the file to write.
        pikv: the cache whose pages are to be filled, where there is one.
        per_expert: tokens are told apart by their experts, too.
        budget: bytes of a token in pages, all layers together; None: no budget is to be spent.
    """

    model: Path
    architecture: Architecture
    ids: torch.Tensor
    recall: float
    dtype: torch.dtype
    output: Path
    pikv: PiKVConfig = PiKVConfig()
    per_expert: bool = False
    budget: int | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """What a file says of itself."""
        interleaved = self.architecture.latent_attention is not None
        return {
            "model": self.model.resolve().name,
            "model_sha256": fingerprint(self.model),
            "data_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            "rotary": "interleaved" if interleaved else "halves",
            "settings": {
                "windows": len(self.ids), "length": self.ids.shape[1], "recall": self.recall,
                "dtype": str(self.dtype).removeprefix("torch."), "per_expert": self.per_expert,
            },
        }


def parse_options(argv: Sequence[str]) -> CalibrateOptions:
    """Read the command line of `launch/calibrate.py` and the text.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    parser = ArgumentParser("Sum up what keys, values and queries are like on a text")
    _add_common(parser, num_windows=64, recall=None)
    parser.add_argument("--per-expert", action="store_true",
                        help="tell tokens apart by their experts, too, for per_expert of "
                        "codec.transform: 4 bytes for each layer, expert (32 at most) and KV head, "
                        "times w (w + 1) of keys and of values of width w")
    args = parser.parse_args(argv)
    return replace(_options(args), per_expert=args.per_expert)


def parse_allocation(argv: Sequence[str]) -> CalibrateOptions:
    """Read the command line of `launch/allocate.py` and the text.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    parser = ArgumentParser("Choose the codec of every layer for a budget of bytes a token")
    _add_common(parser, num_windows=4, recall=0.0)
    parser.add_argument("--pikv", required=True, metavar="FILE",
                        help="YAML file of a cache, or name of a preset, without a codec")
    parser.add_argument("--bytes", type=positive(int), required=True,
                        help="of a token in pages, all layers of a rank together")
    args = parser.parse_args(argv)
    options = replace(_options(args), pikv=read_cache(args.pikv), budget=args.bytes)
    if options.pikv.layers:
        raise ValueError(f"--pikv {args.pikv}: layers are to be chosen; leave them out")
    if options.architecture.latent_attention is not None:
        raise ValueError(
            f"--model {args.model}: latent attention stores values with the keys, and the menu has "
            "both apart; choose codec.format, and codec.transform.rank, yourself"
        )
    return options


def _options(args) -> CalibrateOptions:
    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: there is no such directory")
    architecture = read_architecture(args.model)
    if args.length > architecture.max_sequence_length:
        raise ValueError(
            f"--length {args.length} exceeds the model's longest sequence, "
            f"{architecture.max_sequence_length}"
        )
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.windows % num_ranks:
        raise ValueError(
            f"--windows {args.windows} must be a multiple of the {num_ranks} ranks that were "
            "launched"
        )
    files = args.text or stdlib_sources(held_out=False)
    tokenizer = Tokenizer.from_directory(args.model)
    recall = args.recall
    if recall is None:
        recall = 0.5 if is_bytewise(tokenizer) else 0.0
    ids = windows(files, tokenizer, args.windows, args.length, recall)
    return CalibrateOptions(
        args.model, architecture, ids, recall, DTYPES[args.dtype], writable(args.output)
    )


def _add_common(parser: ArgumentParser, num_windows: int, recall: float | None) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add("--output", type=Path, required=True, help="the file to write")
    add("--text", type=Path, nargs="+", metavar="FILE",
        help="texts; default: sources of Python's standard library")
    add("--length", type=positive(int), default=1024, help="tokens of a window; default: 1024")
    add("--windows", type=positive(int), default=num_windows, help="of text; default: %(default)s")
    add("--recall", type=share, default=recall, metavar="SHARE",
        help="of the windows that are pairs to recall, as the demo model learned; default: half "
        "where the tokenizer is byte-level, else none" if recall is None else argparse.SUPPRESS)
    add("--dtype", choices=list(DTYPES), default=default_dtype(), help="default: %(default)s")
