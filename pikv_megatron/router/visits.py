"""What a visit to a shard will give of the attention, by what home knows of the shard: a table a
layer that serves every sequence, wherever its pages lie.

Shards of two sequences have nothing in common but what can be said of any shard, so what is learned
are the weights of that. Its sums are additive: over ranks, over runs, and over a calibration.

Legend: n sequences, N shards, F features.
"""

from typing import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_FEATURES = 4
# Visits' worth of trust in the promise, which counts until there is better knowledge.
TRUST = 1.0
LEAST = 1e-3  # of a promise that a visit will give


def visit_features(promise: Tensor, newest: Tensor | None) -> Tensor:
    """[n, N, F]: a shard's promise, that times the largest promise of all (where few pages promise
    most, far tokens have most of the attention, too), whether it holds the newest page, and 1 / N.

    Args:
        promise: [n, N], its share of the relevance.
        newest: [n], int64, the shard that holds the newest page; None: unknown.
    """
    num_shards = promise.shape[1]
    holds_newest = torch.zeros_like(promise)
    if newest is not None:
        holds_newest = F.one_hot(newest, num_shards).to(promise.dtype)
    even = torch.full_like(promise, 1 / num_shards)
    most = promise.amax(dim=1, keepdim=True)
    return torch.stack([promise, promise * most, holds_newest, even], dim=2)


class VisitSums:
    """Least squares of what visits gave, over their features.

    Args:
        name: of these sums among what a layer has learned.

    Attributes:
        known: what a calibration or earlier runs taught, [F, F] and [F], float64, by name.
        taught: what this run does; it counts from the next one on, so that what a sequence reads
            depends neither on those beside it nor on the number of ranks.
    """

    def __init__(self, name: str, device: torch.device):
        self._names = f"{name}.squares", f"{name}.products"
        shapes = (NUM_FEATURES, NUM_FEATURES), (NUM_FEATURES,)
        self.known, self.taught = (
            {name: torch.zeros(shape, dtype=torch.float64, device=device)
             for name, shape in zip(self._names, shapes)}
            for _ in range(2)
        )
        self._weights = self._solved()

    def recall(self, learned: Mapping[str, Tensor]) -> None:
        """Begin with what is known of a layer, by name; if it is not among that, with nothing."""
        if self._names[0] in learned:
            self.known = {name: learned[name] for name in self._names}
            self._weights = self._solved()

    def expect(self, features: Tensor) -> Tensor:
        """[n, N]: the attention that visits will give, for features [n, N, F]."""
        # A linear map can fall below 0, where the promise still says which shard is better.
        return torch.maximum(features @ self._weights, LEAST * features[..., 0])

    def teach(self, features: Tensor, shards: Tensor, mass: Tensor) -> None:
        """Take note of what the visited shards [n, N] gave, mass [n, N]."""
        visited = (features * shards.unsqueeze(2)).double().flatten(0, 1)
        for own, new in zip(self.taught.values(), sums_of(visited, mass.double().flatten())):
            own += new

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [*self.known.values(), *self.taught.values(), self._weights]

    def _solved(self) -> Tensor:
        """[F], float32: ridge regression, drawn towards the promise."""
        squares, products = self.known.values()
        promise = torch.zeros_like(products)
        promise[0] = 1.0
        trust = TRUST * torch.eye(NUM_FEATURES, dtype=squares.dtype, device=squares.device)
        return torch.linalg.solve(squares + trust, products + TRUST * promise).float()


def sums_of(features: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """[F, F] and [F], for features [v, F] of visits and what they gave, mass [v]."""
    return features.T @ features, features.T @ mass
