"""What linear transforms are fitted to.

Legend: ng KV heads, t tokens, w width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """First and second moments of keys, or of values, head by head. All float32.

    Attributes:
        mean: [ng, w].
        scatter: [ng, w, w], sum over tokens of (x - mean)^T (x - mean).
        count: tokens.
        metric: [ng, w, w], what an error x - x^ costs, (x - x^) metric (x - x^)^T: of keys, the
            second moment of the queries that meet them; of values, the output projection times its
            transpose; None: its square.
    """

    mean: Tensor
    scatter: Tensor
    count: int
    metric: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Of tokens x [ng, t, w]."""
        x = x.float()
        mean = x.mean(dim=1)
        centred = x - mean.unsqueeze(1)
        return cls(mean, torch.bmm(centred.transpose(1, 2), centred), x.shape[1])

    def to(self, device: torch.device) -> "Moments":
        """On another device."""
        metric = None if self.metric is None else self.metric.to(device)
        return Moments(self.mean.to(device), self.scatter.to(device), self.count, metric)

    @property
    def second(self) -> Tensor:
        """[ng, w, w], sum over tokens of x^T x."""
        return self.scatter + self.count * self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


class KVMoments(NamedTuple):
    """Of one layer."""

    keys: Moments
    values: Moments


def plane_order(width: int) -> Tensor:
    """Channels of a key plane by plane: RoPE turns channel i together with i + width / 2.

    Example:
        Width 6: 0, 3, 1, 4, 2, 5. Width 5 has no such pairs: as they are.
    """
    if width % 2:
        return torch.arange(width)
    return torch.arange(width).view(2, -1).T.flatten()
