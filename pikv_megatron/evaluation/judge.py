"""Judges predictions beside those of the lossless cache, step by step.

Legend: n sequences of this home rank, T tokens behind the prompt, V ids, j judged tokens of a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_megatron.evaluation.task import Task


class Judge:
    """Sums over the batches of a task, of this home rank.

    Attributes:
        sums: judged tokens, those that were the likeliest, their loss, their divergence, answers,
            right ones, sequences, tokens of them until the first that was not the likeliest: [8].
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64)

    def start(self, targets: Tensor, answer: Tensor) -> None:
        """A batch of targets [n, T] with their answers [n, T] begins."""
        self._targets, self._answer = targets, answer
        self._is_judged = answer >= 0
        self._is_right = torch.ones_like(self._is_judged)

    def hear(self, place: int, logits: Tensor, reference: Tensor | None) -> Tensor:
        """What was predicted for a place [n, V], and what the lossless cache predicted [j, V].

        Returns:
            Log-probabilities [j, V] of the judged tokens, the reference of later caches.
        """
        rows = self._is_judged[:, place]
        targets = self._targets[rows, place]
        logprobs = logits[rows].log_softmax(1)
        reference = logprobs if reference is None else reference
        self._is_right[rows, place] = is_right = logprobs.argmax(1) == targets
        loss = F.nll_loss(logprobs, targets, reduction="sum")
        divergence = F.kl_div(logprobs, reference, reduction="sum", log_target=True)
        count = torch.tensor(float(len(targets)))
        self.sums[:4] += torch.stack([count, is_right.sum(), loss, divergence]).double()
        return logprobs

    def end(self) -> None:
        """Count whole answers, and how far each sequence got."""
        number = self._answer.clamp(min=0)
        count = int(number.max()) + 1 if number.numel() else 1
        shape = len(number), count
        is_there = torch.zeros(shape, dtype=torch.int64).scatter_add_(
            1, number, self._is_judged.long()
        ) > 0
        num_wrong = torch.zeros(shape, dtype=torch.int64).scatter_add_(
            1, number, (self._is_judged & ~self._is_right).long()
        )
        agreed = (self._is_right.long().cumprod(1) * self._is_judged).sum(1)
        found = is_there.sum(), (is_there & (num_wrong == 0)).sum(), len(number), agreed.sum()
        self.sums[4:] += torch.tensor([float(x) for x in found], dtype=torch.float64)


class Reference:
    """What the lossless cache said to a task, on this home rank.

    Attributes:
        tasks: its batches; of free ones, with the greedy text.
        logprobs: by batch and place, [j, V].
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.logprobs: list[list[Tensor]] = []
