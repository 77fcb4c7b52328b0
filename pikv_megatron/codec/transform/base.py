"""What is stored of keys and values before they are packed, and how a query meets it.

Attention over transformed pages never expands them: the query is moved into the keys' space once,
and the output out of the values' space once.

Legend: n sequences, sq query tokens, np query heads, ng KV heads, c pages, S tokens a page, hn head
width, r_k and r_v stored widths.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from pikv_megatron.codec.transform.moments import KVMoments
from pikv_megatron.options import Options
from pikv_megatron.types import Ageing, KVShape


class KVTransform(ABC):
    """A way to store keys and values in other widths.

    Attributes:
        key_width: r_k.
        value_width: r_v.
        pooled: neighbours that are stored as one token.
        learns: it has to be fitted.
    """

    key_width: int
    value_width: int
    pooled: int = 1
    learns: bool = False

    def is_fitted(self, slot: int) -> bool:
        """Whether `fit` has nothing to do for a sequence."""
        return True

    def fit(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Learn from the tokens [ng, t, hn] of a sequence's first pages, before they are stored."""

    def forget(self, slot: int) -> None:
        """The sequence ended."""

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages [ng, c, S, hn] of the sequences `slots` [c] -> [ng, c, S / pooled, r_k] and
        [ng, c, S / pooled, r_v]."""

    @abstractmethod
    def decode(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What encoded pages stand for: the inverse of `encode`, but for what it loses."""

    @abstractmethod
    def absorb(
        self, query: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [n, sq, np, hn] of the sequences `slots` [n] -> [n, sq, np, r_k], and what is to
        be added to its logits over them, [n, sq, np], float32, not yet scaled."""

    @abstractmethod
    def emit(self, out: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Output over encoded values [n, sq, np, r_v] -> [n, sq, np, hn]."""

    def tensors(self) -> list[torch.Tensor]:
        """What is kept besides the pages."""
        return []


class TransformOptions(Options):
    """Parameters of a transform."""

    @property
    def ageing(self) -> Ageing | None:
        """How older pages are pooled; None: they are not."""
        return None

    @property
    def leaves_keys(self) -> bool:
        """Whether keys are stored as they come, in all their channels."""
        return False

    @property
    def is_by_expert(self) -> bool:
        """Whether the tokens of each expert are stored in their own way."""
        return False

    @abstractmethod
    def build(
        self, kv: KVShape, num_slots: int, moments: Sequence[KVMoments] | None = None,
        num_bases: int = 1,
    ) -> KVTransform | None:
        """The transform of a layer, for `num_slots` sequences; None stores tokens as computed.

        Args:
            moments: of the layer's keys and values, for each of the bases, where it was calibrated.
            num_bases: parts of a sequence with a basis each: what is a sequence's slot to the
                transform then is that of its part, slot * num_bases + part.
        """
