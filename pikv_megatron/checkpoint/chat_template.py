"""Chat templates: Jinja programs that a model's directory brings along."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pikv_megatron.checkpoint.json_file import read_json

DEFAULT_NAME = "default"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate:
    """Turns a conversation into the text that a model was trained to continue.

    Args:
        source: the template.
        special_tokens: texts that the template can name, such as `bos_token`.

    Raises:
        ValueError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat_template is not valid: {error}") from error
        self._special_tokens = special_tokens

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatTemplate":
        """Read `chat_template.jinja`, or the field of `tokenizer_config.json`.

        Raises:
            ValueError: there is neither, or it is not valid.
        """
        path = directory / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        return cls(_source(directory, config), _special_tokens(config))

    def render(self, message: str) -> str:
        """The text with which the model answers a user's first message.

        Raises:
            ValueError: the template refuses the message, or fails.
        """
        try:
            return self._template.render(
                messages=[{"role": "user", "content": message}], tools=None, documents=None,
                add_generation_prompt=True, **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"chat_template: {error}") from error


def _source(directory: Path, config: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get(DEFAULT_NAME)
    if not isinstance(found, str):
        raise ValueError(
            f"{directory}: there is no chat template, neither chat_template.jinja nor "
            "chat_template in tokenizer_config.json: leave --chat out, and write the prompt as the "
            "model's card says"
        )
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what HTML needs escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
