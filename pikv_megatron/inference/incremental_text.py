"""The text of a sequence while it grows, one token at a time.

Only the last few tokens are decoded again at each step, so that n tokens cost n steps.
"""

from collections.abc import Sequence
from itertools import product
from typing import Protocol

INCOMPLETE = "\ufffd"  # how tokenizers decode the bytes of an unfinished (or broken) character
MAX_HELD = 3  # bytes of an unfinished UTF-8 character, at most; each is one token at most
MAX_WINDOW = 32  # tokens decoded again at each step when nothing but broken bytes arrives
PROMPT_WINDOW = 8  # last tokens of a prompt that are decoded with what follows


class TextDecoder(Protocol):
    """The one method of a tokenizer that is used here."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


class IncrementalDecoder:
    """Turns tokens into text one at a time, and gives away complete characters only.

    The pieces are what decoding everything gives, without what decoding the prompt gives. Tokens
    are decoded with those that came before them since the last but one complete character: some
    tokenizers spell a token otherwise at the start of a text.

    Args:
        tokenizer: decodes.
        prompt: what comes before the first token; a character may begin there.

    >>> decoder.push(0xE2), decoder.push(0x82), decoder.push(0xAC)  # byte-level tokens
    ('', '', '€')
    """

    def __init__(self, tokenizer: TextDecoder, prompt: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._window, held = _end_of_text(tokenizer, prompt)
        self._boundary = len(self._window) - held  # tokens up to the last complete character
        self._given = len(self._decode(self._window[: self._boundary]))  # characters given away
        self._text = self._decode(self._window)
        self._prompt_held = len(self._text) - self._given

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that became complete, often empty."""
        self._window.append(token_id)
        self._text = self._decode(self._window)
        held = len(self._text) - len(self._text.rstrip(INCOMPLETE))
        if len(self._window) - self._boundary > MAX_HELD:
            held = min(held, MAX_HELD)  # some of it is broken, not unfinished
        complete = len(self._text) - held
        piece = self._text[self._given : complete]
        self._given = max(self._given, complete)
        if piece and not held:
            self._drop(self._boundary)
            self._boundary = len(self._window)
        elif len(self._window) > MAX_WINDOW:
            self._drop(MAX_WINDOW // 2)
            self._boundary = max(0, self._boundary - MAX_WINDOW // 2)
        return self._without_prompts(piece)

    @property
    def pending(self) -> str:
        """The text held back, because the next token may change it."""
        return self._without_prompts(self._text[self._given :], is_kept=True)

    def _without_prompts(self, piece: str, is_kept: bool = False) -> str:
        """Leave out broken bytes that the prompt ends with: they have been there before."""
        broken = len(piece) - len(piece.lstrip(INCOMPLETE))
        own = piece[min(broken, self._prompt_held) :]
        if piece and not is_kept:
            self._prompt_held = 0
        return own

    def _drop(self, num_tokens: int) -> None:
        pending = len(self._text) - self._given
        self._window = self._window[num_tokens:]
        self._text = self._decode(self._window)
        self._given = max(0, len(self._text) - pending)


def _end_of_text(tokenizer: TextDecoder, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The last tokens of a prompt that have any text, and how many of them leave a character
    unfinished. They begin and end between characters, if any border near does so."""
    count = min(PROMPT_WINDOW, len(prompt))
    while count < len(prompt) and not tokenizer.decode(prompt[-count:]):
        count = min(2 * count, len(prompt))
    for first, held in product(range(MAX_HELD + 1), repeat=2):
        end = len(prompt) - held
        text = tokenizer.decode(list(prompt[max(0, len(prompt) - count - first) : end]))
        if not text.startswith(INCOMPLETE) and not text.endswith(INCOMPLETE):
            return list(prompt[max(0, len(prompt) - count - first) :]), min(held, len(prompt))
    return list(prompt[len(prompt) - count :]), 0  # broken, not unfinished
