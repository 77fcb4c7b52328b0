"""JSON files of a Hugging Face directory, and the fields that several of them have."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming the file in every error."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is {path.parent} a Hugging Face directory?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def token_ids(config: dict[str, Any], field: str, path: Path) -> tuple[int, ...]:
    """A config's token id, or list of them, or none, as a tuple.

    Raises:
        ValueError: it is something else; names the file and the field.
    """
    value = config.get(field)
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(
            f"{path}: {field} = {value!r}: expected a token id, a list of them, or null"
        )
    return tuple(numbers)


def token_id(config: dict[str, Any], field: str, path: Path) -> int | None:
    """A config's single token id (the first, where several are listed), or None.

    Raises:
        ValueError: it is something else; names the file and the field.
    """
    return next(iter(token_ids(config, field, path)), None)
