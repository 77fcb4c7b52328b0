"""What is fed and what is judged.

Legend: b sequences, L tokens of each, P of them its prompt, T = L - P behind it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

NOT_JUDGED = -1


@dataclass(frozen=True)
class Task:
    """Sequences of one length: prompts that are prefilled, and what is fed token by token.

    Attributes:
        ids: [b, L], int64.
        answer: [b, T], int64, which answer of its sequence a token behind the prompt belongs to,
            -1 where it is not judged. An answer is right if each of its tokens is the likeliest.
        is_free: what is behind the prompt is the lossless cache's greedy text instead.
    """

    ids: Tensor
    answer: Tensor
    is_free: bool = False

    @property
    def prompt_len(self) -> int:
        """P."""
        return self.ids.shape[1] - self.answer.shape[1]

    @property
    def is_judged(self) -> Tensor:
        """[b, T], bool."""
        return self.answer != NOT_JUDGED

    @property
    def num_decode_steps(self) -> int:
        """Of one batch: the last token is judged and not fed."""
        return self.answer.shape[1] - 1

    def batches(self, size: int) -> Iterator["Task"]:
        """The same in parts of at most `size` sequences."""
        for ids, answer in zip(self.ids.split(size), self.answer.split(size)):
            yield replace(self, ids=ids, answer=answer)
