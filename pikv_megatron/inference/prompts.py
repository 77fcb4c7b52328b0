"""The texts that a command line names, and their tokens."""

from collections.abc import Sequence
from pathlib import Path

from pikv_megatron.checkpoint.chat_template import ChatTemplate
from pikv_megatron.checkpoint.tokenizer import Tokenizer


def read_prompts(texts: Sequence[str], file: Path | None) -> list[tuple[str, str]]:
    """Where each prompt was given, and its text: those of `--prompt`, then the file's lines.

    Raises:
        ValueError: there is none, one is empty, or the file cannot be read.
    """
    named = [(f"--prompt {number}", text) for number, text in enumerate(texts, start=1)]
    if file is not None:
        name = f"--prompt-file {file}, line"
        lines = _lines(file)
        named += [(f"{name} {number}", text) for number, text in enumerate(lines, start=1)]
    if not named:
        raise ValueError("there is nothing to continue: give --prompt or --prompt-file")
    for name, text in named:
        if not text:
            raise ValueError(f"{name} is empty")
    return named


def encode_prompts(
    prompts: Sequence[tuple[str, str]], tokenizer: Tokenizer, chat_model: Path | None,
    add_special_tokens: bool, vocab_size: int,
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: as `read_prompts` gives them.
        tokenizer: the model's.
        chat_model: directory of the chat template that each text is put into; None: into none.
        add_special_tokens: put the tokenizer's special tokens around a text; a template has its
            own.
        vocab_size: the model's; ids must be below it.

    Raises:
        ValueError: a prompt is no Unicode, has no tokens, or has one that the model lacks.
    """
    template = None if chat_model is None else ChatTemplate.from_directory(chat_model)
    every = []
    for name, text in prompts:
        try:
            if template is None:
                ids = tokenizer.encode(text, add_special_tokens)
            else:
                ids = tokenizer.encode(template.render(text), add_special_tokens=False)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _check(name, ids, vocab_size)
        every.append(ids)
    return every


def _check(name: str, ids: list[int], vocab_size: int) -> None:
    if not ids:
        raise ValueError(f"{name} has no tokens")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"{name} has token {max(ids)}, and the model's vocab_size is {vocab_size}: "
            "tokenizer.json belongs to another model"
        )


def _lines(file: Path) -> list[str]:
    """Lines end with a line feed, after a carriage return or not; nothing else ends one."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {file}: {error}") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines
