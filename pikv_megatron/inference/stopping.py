"""When a sequence ends, and its text while it grows."""

from collections.abc import Mapping, Sequence

from pikv_megatron.inference.incremental_text import IncrementalDecoder, TextDecoder

STOP = "stop"
FIRST_MARK = 0x100000  # private use: stands for a special token, whose text is not shown


class StopCriteria:
    """Ends sequences at stop tokens and stop strings, and keeps their texts.

    A stop string is found wherever it appears in the text: across tokens, or from within one. It
    may hold special tokens, which the text leaves out. The text ends before it, and before a stop
    token.

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
        special = getattr(tokenizer, "special_tokens", {})
        self._marks = _marks({n: text for n, text in special.items() if text}, self.stop_strings)
        self.reset()

    def reset(self, prompts: Sequence[Sequence[int]] = ()) -> None:
        """Forget every sequence. The new ones continue `prompts`, token ids: a text is what
        decoding both gives beyond the prompt's own."""
        self._prompts = prompts
        self._texts: dict[int, _GrowingText] = {}

    def update(self, sequence_index: int, token_id: int) -> str | None:
        """Take a sequence's next token; "stop" where it ends the sequence, else None."""
        text = self._text_of(sequence_index)
        if not text.is_finished:
            if token_id in self.stop_token_ids:
                text.is_finished = True
            elif text.decoder:
                mark = self._marks.get(token_id, ("", ""))[0]
                text.append(text.decoder.push(token_id) + mark)
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
        return self._text_of(sequence_index)

    def _text_of(self, sequence_index: int) -> "_GrowingText":
        if sequence_index not in self._texts:
            self._texts[sequence_index] = self._new_text(sequence_index)
        return self._texts[sequence_index]

    def _new_text(self, sequence_index: int) -> "_GrowingText":
        if self._tokenizer is None:
            return _GrowingText(None, (), "")
        is_known = sequence_index < len(self._prompts)
        prompt = self._prompts[sequence_index] if is_known else ()
        sought = {*self.stop_strings, *(_marked(s, self._marks) for s in self.stop_strings)}
        marks = "".join(mark for mark, _ in self._marks.values())
        return _GrowingText(IncrementalDecoder(self._tokenizer, prompt), sorted(sought), marks)


def _marks(special: Mapping[int, str], stop_strings: Sequence[str]) -> dict[int, tuple[str, str]]:
    """A character and the text of each special token that a stop string holds, by token."""
    sought = sorted(n for n, text in special.items() if any(text in stop for stop in stop_strings))
    return {n: (chr(FIRST_MARK + i), special[n]) for i, n in enumerate(sought)}


def _marked(stop: str, marks: Mapping[int, tuple[str, str]]) -> str:
    """A stop string with marks in place of special tokens, the longest first."""
    for mark, text in sorted(marks.values(), key=lambda pair: -len(pair[1])):
        stop = stop.replace(text, mark)
    return stop


class _GrowingText:
    """One sequence's text, in which stop strings are looked for as it grows.

    Marks are looked for, too, and left out of the text.
    """

    def __init__(
        self, decoder: IncrementalDecoder | None, stop_strings: Sequence[str], marks: str
    ):
        self.decoder = decoder
        self.is_finished = False
        self._is_cut = False  # by a stop string
        self._stop_strings = stop_strings
        self._reach = max(map(len, stop_strings), default=1) - 1
        self._certain: list[str] = []
        self._unmark = dict.fromkeys(map(ord, marks))
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
        self._certain.append(tail[:keep].translate(self._unmark))
        self._tail = "" if matches else tail[keep:]

    def whole(self) -> str:
        """All of the text."""
        pending = "" if self._is_cut or not self.decoder else self.decoder.pending
        return "".join(self._certain) + self._tail.translate(self._unmark) + pending

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
