"""What a policy that scores tokens sees of a prompt, or of the chunk of it that a step feeds.

Legend: t tokens, h hidden size, np query heads, ng KV heads, w width of a head.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class LayerSizes(NamedTuple):
    """Of one layer on this rank.

    Attributes:
        number: of the layer, from 0.
        num_layers: of the model.
        hidden_size: h.
        num_heads: np.
        num_groups: ng.
        head_width: w.
    """

    number: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    head_width: int


class Prompt(ABC):
    """One sequence's tokens in one layer.

    Attributes:
        sizes: of the layer.
        hidden: [t, h], the layer's input behind its norm, or before it where norm and projection
            are one module.
        keys: [t, ng, w], rotated.
        values: [t, ng, w].
        past: tokens of the sequence before these.
    """

    sizes: LayerSizes
    hidden: Tensor
    keys: Tensor
    values: Tensor
    past: int

    @abstractmethod
    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [t, np, w] and keys [t, ng, w] of hidden states, before RoPE."""

    @abstractmethod
    def angles(self, positions: Tensor) -> Tensor:
        """[t, w], by which heads at these positions [t] are turned, halves alike."""
