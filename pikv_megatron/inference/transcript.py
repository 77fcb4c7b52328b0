"""The texts of a run, printed while they grow or at the end."""

from typing import Sequence, TextIO

from pikv_megatron.inference.stopping import StopCriteria


class Transcript:
    """Collects every prompt's new text.

    Args:
        prompts: the texts that are continued.
        criteria: decodes the new tokens, and cuts the texts where they stop.
        out: where texts are printed.
        is_streamed: print the only prompt's text as it comes.
    """

    def __init__(
        self, prompts: Sequence[str], criteria: StopCriteria, out: TextIO, is_streamed: bool
    ):
        self._prompts, self._criteria = prompts, criteria
        self._out, self._is_streamed = out, is_streamed
        self._num_printed = 0
        if is_streamed:
            self._print(prompts[0])

    def add(self, tokens: Sequence[int | None]) -> None:
        """Take a step's tokens, by prompt; None where there is none."""
        for index, token in enumerate(tokens):
            if token is not None:
                self._criteria.update(index, token)
        if self._is_streamed:
            piece = self._criteria.take_text(0)
            self._num_printed += len(piece)
            self._print(piece)

    def finish(self) -> list[str]:
        """Print what was not printed yet, and return the new texts."""
        texts = [self._criteria.text(index) for index in range(len(self._prompts))]
        if self._is_streamed:
            self._print(texts[0][self._num_printed :] + "\n")
        else:
            for prompt, text in zip(self._prompts, texts):
                self._print(f"{prompt}{text}\n\n")
        return texts

    def _print(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
