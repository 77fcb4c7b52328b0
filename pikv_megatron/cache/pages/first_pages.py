"""What codecs and sketches learn from a sequence's first pages."""

from typing import Protocol

import torch


class Learner(Protocol):
    """A codec or a sketcher whose bases belong to a sequence."""

    def is_fitted(self, slot: int) -> bool:
        """Whether there is nothing to learn."""

    def fit(self, slot: int, *tokens: torch.Tensor) -> None:
        """Learn from tokens [ng, t, w]."""


def fit_new(
    learner: Learner, slots: torch.Tensor, is_page: torch.Tensor, *pages: torch.Tensor
) -> None:
    """Fit every sequence that has pages now and was not fitted.

    Args:
        slots: [c], int64, the pages' sequences.
        is_page: [c], bool, False marks padding.
        pages: keys, or keys and values, [ng, c, S, w].
    """
    slots = torch.where(is_page, slots, -1)
    for slot in slots.unique().tolist():
        if slot >= 0 and not learner.is_fitted(slot):
            own = (slots == slot).nonzero().squeeze(1)
            learner.fit(slot, *(part[:, own].flatten(1, 2) for part in pages))
