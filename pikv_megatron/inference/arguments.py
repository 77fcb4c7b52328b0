"""What the command lines of `launch/` have in common."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

MARK = "\0"  # no argument of a command line can hold it


class ArgumentParser(argparse.ArgumentParser):
    """Raises `ValueError` where argparse would exit, and prints its help on the first rank only."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        # The launcher adds it to every program.
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    def error(self, message: str) -> None:
        raise ValueError(message)

    def print_help(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def joined_values(
    parser: argparse.ArgumentParser, argv: Sequence[str], names: Sequence[str]
) -> list[str]:
    """`--prompt -x` as `--prompt=-x`: argparse would take a text with a dash for an option.

    An option of the parser's own stays one, so that a forgotten value is still noticed. The value
    `--` is marked, since argparse would drop it; `text` is the type of these options.
    """
    joined: list[str] = []
    for argument in argv:
        is_option = argument.split("=")[0] in parser._option_string_actions
        if joined and joined[-1] in names and argument.startswith("-") and not is_option:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    dropped = {f"{name}=--": f"{name}={MARK}--" for name in names}
    return [dropped.get(argument, argument) for argument in joined]


def text(value: str) -> str:
    """The `type` of an option that `joined_values` is told of."""
    return value.removeprefix(MARK)


def positive(kind: type):
    """The `type` of an option that takes positive numbers of a kind."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its own message
    return parse


def share(text: str) -> float:
    """The `type` of an option that takes a share of a whole."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def default_dtype() -> str:
    """Name of the type that suits the machine."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def writable(path: Path | None, option: str = "--output") -> Path | None:
    """The file that an option names, where one can be written there.

    Raises:
        ValueError: it cannot.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{option} {path}: cannot write a file there")
    return path
