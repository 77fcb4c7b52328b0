"""How the heads of a layer meet what is cached of a token.

Grouped attention caches keys and values as its heads read them. Latent attention (DeepSeek-V2,
arXiv 2405.04434) caches one row for all heads, a latent and a rotated key; a head's keys and values
are projections of it. Decoding need not expand them: with k = U_k c, q . k = (U_k^T q) . c, and the
sum of values U_v c is U_v times the sum of latents. Both maps are linear and the same on every rank
of the expert-parallel group, so queries and results travel on whichever side is narrower.

Legend: np heads of this rank, w_n and w_r widths of a query's two parts, r rank of the latent, w_v
width of a head's value.
"""

import torch

from pikv_megatron.ops.project import project
from pikv_megatron.types import AttentionState


def sent_widths(query: int, rotated: int, rank: int, value: int) -> tuple[int, int]:
    """Numbers of a head's query and result as they travel, from w_n, w_r, r and w_v.

    Example:
        DeepSeek-V3, 128, 64, 512 and 128: a query of 192 numbers, not 576, a result of 128.
    """
    return min(query, rank) + rotated, min(rank, value)


class HeadMaps:
    """Grouped attention: nothing is mapped."""

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """A query [..., np, w] as it meets what is cached."""
        return query

    def emit(self, state: AttentionState) -> AttentionState:
        """Attention over what is cached, as the output projection takes it."""
        return state

    def expand(
        self, key: torch.Tensor, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached of tokens [t, ng, w] as keys and values of the heads."""
        return key, value

    def sent(self, query: torch.Tensor) -> torch.Tensor:
        """A query as it travels to an owner."""
        return query

    def arrived(self, query: torch.Tensor) -> torch.Tensor:
        """It there, absorbed."""
        return query

    def returned(self, state: AttentionState) -> AttentionState:
        """An owner's attention as it travels home, where parts are merged."""
        return state

    def merged(self, state: AttentionState) -> AttentionState:
        """What returned parts come to, emitted."""
        return state


class LatentMaps(HeadMaps):
    """Latent attention: a cached row [r + w_r] is a latent and a rotated key.

    Args:
        key_up: [np, w_n, r], U_k.
        value_up: [np, r, w_v], U_v.
    """

    def __init__(self, key_up: torch.Tensor, value_up: torch.Tensor):
        self._key_up, self._value_up = key_up, value_up
        _, self._query_width, self._rank = key_up.shape
        self._absorbs_early = self._rank < self._query_width
        self._emits_early = value_up.shape[2] < self._rank

    def absorb(self, query):
        """[..., np, w_n + w_r] -> [..., np, r + w_r]."""
        own, rotated = query.split([self._query_width, query.shape[-1] - self._query_width], -1)
        return torch.cat([project(own, self._key_up), rotated], dim=-1)

    def emit(self, state):
        return state._replace(out=project(state.out, self._value_up))

    def expand(self, key, value):
        """Keys [t, np, w_n + w_r] and values [t, np, w_v]: for a prompt, cheaper than absorbing."""
        latent, rotated = key.split([self._rank, key.shape[-1] - self._rank], dim=-1)
        latent = latent.transpose(0, 1)  # one group
        keys = torch.matmul(latent, self._key_up.transpose(1, 2)).transpose(0, 1)
        rotated = rotated.expand(-1, len(self._key_up), -1)
        values = torch.matmul(latent, self._value_up).transpose(0, 1)
        return torch.cat([keys, rotated], dim=-1), values

    def sent(self, query):
        return self.absorb(query) if self._absorbs_early else query

    def arrived(self, query):
        return query if self._absorbs_early else self.absorb(query)

    def returned(self, state):
        return self.emit(state) if self._emits_early else state

    def merged(self, state):
        return state if self._emits_early else self.emit(state)


GROUPED = HeadMaps()
