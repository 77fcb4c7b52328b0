"""Special tokens that stand beside `tokenizer.json` only: older files list them elsewhere."""

from pathlib import Path
from typing import Any

import tokenizers

from pikv_megatron.checkpoint.json_file import read_json

TOKEN_FIELDS = ("single_word", "lstrip", "rstrip", "normalized")


def add_listed_tokens(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Add what `added_tokens.json` and `tokenizer_config.json` list and the tokenizer lacks.

    Raises:
        ValueError: a token cannot have the id that is listed for it, or is listed wrongly.
    """
    listed = _listed(directory)
    known = backend.get_added_tokens_decoder()
    for number in sorted(listed):
        path, token = listed[number]
        if number in known and known[number].content == token.content:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise ValueError(
                f"{path}: token {token.content!r} is listed as {number}, where tokenizer.json "
                f"leaves it {backend.token_to_id(token.content)}"
            )


def _listed(directory: Path) -> dict[int, tuple[Path, tokenizers.AddedToken]]:
    found = {}
    path = directory / "added_tokens.json"
    if path.is_file():
        for content, number in read_json(path).items():
            found[_number(number, content, path)] = path, _token({"content": content}, path)
    path = directory / "tokenizer_config.json"
    if path.is_file():
        entries = read_json(path).get("added_tokens_decoder") or {}
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: added_tokens_decoder must map token ids to tokens")
        for number, fields in entries.items():
            found[_number(number, "added_tokens_decoder", path)] = path, _token(fields, path)
    return found


def _number(value: Any, name: str, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name}: {value!r} is not a token id") from error


def _token(fields: Any, path: Path) -> tokenizers.AddedToken:
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f"{path}: an added token needs its content, got {fields!r}")
    flags = {name: bool(fields[name]) for name in TOKEN_FIELDS if name in fields}
    return tokenizers.AddedToken(
        fields["content"], special=bool(fields.get("special", False)), **flags
    )
