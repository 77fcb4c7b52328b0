"""The command line of `launch/train_demo.py`, checked before anything is computed."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Sequence, TypeVar

from pydantic import ValidationError

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.config_writer import write_config
from pikv_megatron.demo.settings import TrainingSettings
from pikv_megatron.demo.tokenizer import VOCAB_SIZE
from pikv_megatron.inference.arguments import ArgumentParser

Settings = TypeVar("Settings", Architecture, TrainingSettings)


@dataclass(frozen=True)
class TrainOptions:
    """What to train and where to put it.

    Attributes:
        output: directory to write.
        architecture: of the model.
        settings: of the training, its steps already scaled.
        seed: of weights and batches.
        threads: how many compute.
    """

    output: Path
    architecture: Architecture
    settings: TrainingSettings
    seed: int
    threads: int


def parse_options(argv: Sequence[str], configs: Path) -> TrainOptions:
    """Read the command line and the files that it names.

    Args:
        argv: without the program's name.
        configs: the folder of the default files.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    args = _parser(configs).parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ValueError("training runs in one process: start it with python, not with a launcher")
    if not 0 < args.scale <= 10:
        raise ValueError(f"--scale {args.scale} must lie above 0, and not above 10")
    if not 1 <= args.threads <= (os.cpu_count() or 1):
        raise ValueError(f"--threads {args.threads} must lie between 1 and {os.cpu_count()}")
    _check_output(args.output)
    settings = _read(TrainingSettings, args.training).scaled(args.scale)
    architecture = _read(Architecture, args.model)
    _check_model(architecture, settings)
    return TrainOptions(args.output, architecture, settings, args.seed, args.threads)


def _parser(configs: Path) -> ArgumentParser:
    parser = ArgumentParser("Train the demo model on the CPU")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="directory to write, made if missing")
    add("--model", type=Path, default=configs / "model/demo.yaml", help="default: %(default)s")
    add("--training", type=Path, default=configs / "demo/training.yaml",
        help="default: %(default)s")
    add("--scale", type=float, default=1.0, help="share of the steps to run; default: 1")
    add("--seed", type=int, default=0, help="of weights and batches; default: 0")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    return parser


def _check_output(path: Path) -> None:
    """Refuse now what would fail after all the training."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output {path}: {nearest} is not a directory that can be written")


def _check_model(architecture: Architecture, settings: TrainingSettings) -> None:
    if architecture.vocab_size < VOCAB_SIZE:
        raise ValueError(f"vocab_size {architecture.vocab_size} must be at least {VOCAB_SIZE}")
    longest = max(max(stage.lengths) for stage in settings.stages)
    if longest > architecture.max_sequence_length:
        raise ValueError(
            f"lengths has {longest}, above max_sequence_length {architecture.max_sequence_length}"
        )
    with TemporaryDirectory() as directory:  # a model that cannot be saved is not worth training
        write_config(architecture, Path(directory), architecture.dtype)


def _read(kind: type[Settings], path: Path) -> Settings:
    try:
        return kind.from_yaml(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {place}: {first['msg']}") from error
