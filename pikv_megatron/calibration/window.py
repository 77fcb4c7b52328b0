"""A window of text in one layer, as its cache comes to know it.

Legend: t tokens, np query heads, ng KV heads, g = np / ng, w width of a cached key, w_r rotated
channels, h hidden size, E experts on all ranks.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.types import KVShape

# What a stream window would hold anyway: the first tokens, and those just before a query.
SINKS = 4
NEAR = 64
FARTHEST = 64
_QUERIES = 256  # of which all weights are held at once


class FarAttention(NamedTuple):
    """What queries see beyond the first tokens and their neighbours.

    Attributes:
        share: [np], of the attention of those queries, one in 64, that look there most: a head
            that retrieves seldom retrieves all the same.
        peak: [ng, t], largest share that any query so far away gave a token, over a group's heads.
        by_expert: [t, E], share that a query gave to the tokens of each expert, mean over heads;
            None in a layer without experts.
    """

    share: Tensor
    peak: Tensor
    by_expert: Tensor | None


@dataclass
class LayerWindow:
    """One window.

    Attributes:
        number: of the window, from 0.
        kv: what is cached of a token.
        query: [t, np, w], rotated.
        key: [t, ng, w], rotated.
        value: [t, ng, w_v].
        softmax_scale: factor on the logits.
        angles: [w_r], by which a token is turned further than the one before it; None: unknown.
        is_interleaved: channels 2 i and 2 i + 1 are a pair, else i and i + w_r / 2.
        hidden: [t, h], what the attention was given.
        experts: [t, E], float32, 1 for the expert that had most of a token; None: the layer has
            none.
        per_expert: tokens are to be told apart by their experts wherever that is dear.
    """

    number: int
    kv: KVShape
    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    angles: Tensor | None
    is_interleaved: bool
    hidden: Tensor
    experts: Tensor | None
    per_expert: bool = False

    @property
    def place(self) -> Tensor:
        """[t], int64."""
        return torch.arange(len(self.key), device=self.key.device)

    def weights(self, at: Tensor) -> Tensor:
        """[ng, g, q, t], the attention of the queries at places `at` [q] to all tokens."""
        query = self.query[at].float().unflatten(1, (self.key.shape[1], -1))
        logits = torch.einsum("qngw,knw->ngqk", query, self.key.float()) * self.softmax_scale
        return logits.masked_fill_(self.place > at.unsqueeze(1), -torch.inf).softmax(dim=3)

    @cached_property
    def far(self) -> FarAttention:
        """Of this window."""
        (num_tokens, num_groups), place = self.key.shape[:2], self.place
        peaks = self.key.new_zeros(num_groups, num_tokens, dtype=torch.float32)
        shares, masses = [], []
        for at in place.split(_QUERIES):
            is_far = (place >= SINKS) & (place <= at.unsqueeze(1) - NEAR)
            weights = self.weights(at) * is_far
            shares.append(weights.sum(dim=3).flatten(0, 1)[:, is_far.any(dim=1)])
            peaks = torch.maximum(peaks, weights.amax(dim=(1, 2)))
            if self.experts is not None:
                masses.append(weights.mean(dim=(0, 1)) @ self.experts)
        share = torch.cat(shares, dim=1)
        farthest = share.topk(-(-share.shape[1] // FARTHEST), dim=1).values
        by_expert = torch.cat(masses) if masses else None
        return FarAttention(farthest.mean(dim=1).nan_to_num(), peaks, by_expert)
