"""The tokenizer of a Hugging Face directory, under the names that Megatron-Core's engine calls."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pikv_megatron.checkpoint.added_tokens import add_listed_tokens
from pikv_megatron.checkpoint.json_file import read_json, token_id, token_ids


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        eos_ids: tokens that end a text, from `generation_config.json` or else `config.json`.
        bos_id: the token that starts a text, if there is one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
    ):
        self.backend = backend
        self.eos_ids = tuple(eos_ids)
        self.bos_id = bos_id

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, and from the files beside it special tokens and their ids.

        A prompt is never cut or padded, whatever the file says of training.

        Raises:
            ValueError: a file is missing or broken; names it, and the field.
        """
        directory = Path(directory)
        read_json(directory / "tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{directory / 'tokenizer.json'}: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        add_listed_tokens(backend, directory)
        configs = [directory / name for name in ("generation_config.json", "config.json")]
        found = [(path, read_json(path)) for path in configs if path.is_file()]
        eos = [token_ids(config, "eos_token_id", path) for path, config in found]
        bos = [token_id(config, "bos_token_id", path) for path, config in found]
        given_bos = (number for number in bos if number is not None)
        return cls(backend, next(filter(None, eos), ()), next(given_bos, None))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with whatever special tokens `tokenizer.json` puts around it.

        Raises:
            ValueError: the text is not Unicode: it holds half of a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode at character {error.start}: give it in UTF-8"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that `decode` leaves out, by id."""
        added = self.backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def tokenize(self, text: str) -> list[int]:
        """Megatron-Core's name for `encode`."""
        return self.encode(text)

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Megatron-Core's name for `decode`."""
        return self.decode(ids, skip_special_tokens)

    @property
    def bos(self) -> int | None:
        """Megatron-Core's name for `bos_id`."""
        return self.bos_id

    @property
    def eod(self) -> int:
        """The end-of-document id by which Megatron-Core stops and pads.

        Raises:
            ValueError: no config names an end-of-text token.
        """
        if not self.eos_ids:
            raise ValueError("eos_token_id is missing in generation_config.json and config.json")
        return self.eos_ids[0]
