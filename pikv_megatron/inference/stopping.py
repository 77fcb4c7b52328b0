"""When a sequence ends, and its text while it grows.

Both look at the last few tokens only, so that n tokens cost n steps.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

STOP = "stop"
INCOMPLETE = "\ufffd"  # how tokenizers decode the bytes of an unfinished (or broken) character
MAX_HELD = 3  # bytes of an unfinished UTF-8 character, at most; each is one token at most
MAX_WINDOW = 32  # tokens decoded again at each step when nothing but broken bytes arrives


class TextDecoder(Protocol):
    """The one method of a tokenizer that is used here."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


class IncrementalDecoder:
    """Turns tokens into text one at a time, and gives away complete characters only.

    Tokens are decoded with those that came before them since the last but one complete
    character: some tokenizers spell a token otherwise at the start of a text.

    >>> decoder.push(0xE2), decoder.push(0x82), decoder.push(0xAC)  # byte-level tokens
    ('', '', '€')
    """

    def __init__(self, tokenizer: TextDecoder):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._text = ""  # of the window
        self._given = 0  # characters of it given away
        self._boundary = 0  # tokens of the window up to its last complete character

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that became complete, often empty."""
        self._window.append(token_id)
        self._text = self._tokenizer.decode(self._window)
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
        return piece

    @property
    def pending(self) -> str:
        """The text held back, because the next token may change it."""
        return self._text[self._given :]

    def _drop(self, num_tokens: int) -> None:
        pending = len(self.pending)
        self._window = self._window[num_tokens:]
        self._text = self._tokenizer.decode(self._window)
        self._given = max(0, len(self._text) - pending)


class StopCriteria:
    """Ends sequences at stop tokens and stop strings, and keeps their texts.

    A stop string is found wherever it appears in the text: across tokens, or from within one. The
    text ends before it, and before a stop token.

    Args:
        stop_token_ids: tokens that end a sequence.
        stop_strings: texts that end a sequence.
        tokenizer: decodes tokens; needed for stop strings and for texts.

    Raises:
        ValueError: a stop string is empty or has no tokenizer, or a token id is negative.
    """

    def __init__(
        self,
        stop_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: TextDecoder | None = None,
    ):
        if isinstance(stop_strings, str):
            raise ValueError(f"stop_strings must be a list of texts, got {stop_strings!r}")
        if "" in stop_strings:
            raise ValueError("stop_strings holds an empty text, which would end every sequence")
        if stop_strings and tokenizer is None:
            raise ValueError(f"stop_strings {list(stop_strings)} need a tokenizer to be found")
        if any(token_id < 0 for token_id in stop_token_ids):
            raise ValueError(f"stop_token_ids must not be negative, got {list(stop_token_ids)}")
        self.stop_token_ids = frozenset(stop_token_ids)
        self.stop_strings = tuple(stop_strings)
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget every sequence."""
        self._texts: dict[int, _GrowingText] = defaultdict(self._new_text)

    def update(self, sequence_index: int, token_id: int) -> str | None:
        """Take a sequence's next token; "stop" where it ends the sequence, else None."""
        text = self._texts[sequence_index]
        if not text.is_finished:
            if token_id in self.stop_token_ids:
                text.is_finished = True
            elif text.decoder:
                text.append(text.decoder.push(token_id))
        return STOP if text.is_finished else None

    def text(self, sequence_index: int) -> str:
        """A sequence's whole text up to now, an unfinished character at its end included.

        Raises:
            ValueError: there is no tokenizer.
        """
        return self._decoded(sequence_index).whole()

    def take_text(self, sequence_index: int) -> str:
        """The text that became certain since the last call, for streaming.

        What may still turn out to be the start of a stop string, or part of a character, waits;
        after the last token, what is left is in `text`.

        Raises:
            ValueError: there is no tokenizer.
        """
        return self._decoded(sequence_index).take()

    def _decoded(self, sequence_index: int) -> "_GrowingText":
        if self._tokenizer is None:
            raise ValueError("texts need a tokenizer: pass it to StopCriteria")
        return self._texts[sequence_index]

    def _new_text(self) -> "_GrowingText":
        return _GrowingText(
            IncrementalDecoder(self._tokenizer) if self._tokenizer else None, self.stop_strings
        )


class _GrowingText:
    """One sequence's text, in which stop strings are looked for as it grows."""

    def __init__(self, decoder: IncrementalDecoder | None, stop_strings: Sequence[str]):
        self.decoder = decoder
        self.is_finished = False
        self._is_cut = False  # by a stop string
        self._stop_strings = stop_strings
        self._reach = max(map(len, stop_strings), default=1) - 1
        self._certain: list[str] = []
        self._taken = 0  # entries of _certain handed out by take
        self._tail = ""  # the end of the text, which may turn out to begin a stop string

    def append(self, piece: str) -> None:
        """Add text; the stop string that ends first in it, if any, ends the text before it."""
        tail = self._tail + piece
        found = [(tail.find(stop), len(stop)) for stop in self._stop_strings]
        matches = [(start + length, start) for start, length in found if start >= 0]
        if matches:
            self.is_finished = self._is_cut = True
        keep = min(matches)[1] if matches else len(tail) - self._held_len(tail)
        self._certain.append(tail[:keep])
        self._tail = "" if matches else tail[keep:]

    def whole(self) -> str:
        """All of the text."""
        pending = "" if self._is_cut or not self.decoder else self.decoder.pending
        return "".join(self._certain) + self._tail + pending

    def take(self) -> str:
        """The certain text that was not taken before."""
        taken, self._taken = self._taken, len(self._certain)
        return "".join(self._certain[taken:])

    def _held_len(self, tail: str) -> int:
        """Length of the longest end of `tail` that begins a stop string."""
        for length in range(min(self._reach, len(tail)), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop_strings):
                return length
        return 0
