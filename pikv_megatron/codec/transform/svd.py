"""Truncated singular value decomposition (paper, Table 2, C_SVD).

Legend: n sequences, sq query tokens, np query heads, ng KV heads, g = np / ng, c pages, S tokens a
page, hn head width, r rank.
"""

from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.codec.transform.base import KVTransform, TransformOptions
from pikv_megatron.ops.principal_directions import principal_directions
from pikv_megatron.types import KVShape


class SVDOptions(TransformOptions):
    """Keys and values in their prompt's leading principal directions, head by head."""

    name: Literal["svd"] = "svd"
    rank: int | None = Field(None, ge=1, description="directions; null: half the width")

    def build(self, kv, num_slots):
        width = min(kv.key_width, kv.value_width)
        rank = self.rank or max(1, width // 2)
        if rank > width:
            raise ValueError(
                f"codec.transform.rank {rank} exceeds the width of a head, {width}: lower it"
            )
        return SVDTransform(kv, num_slots, rank)


class SVDTransform(KVTransform):
    """k = mean + B B^T (k - mean): q . k = q . mean + (q B) . (B^T (k - mean)), values likewise.

    Bases are those of a sequence's first sealed pages, those of a prompt or its first chunk.
    """

    def __init__(self, kv: KVShape, num_slots: int, rank: int):
        self.key_width = self.value_width = rank
        self._fitted: set[int] = set()
        self._key_mean, self._key_basis = _empty(num_slots, kv.num_groups, kv.key_width, rank, kv)
        self._value_mean, self._value_basis = _empty(
            num_slots, kv.num_groups, kv.value_width, rank, kv
        )

    def is_fitted(self, slot):
        return slot in self._fitted

    def fit(self, slot, keys, values):
        rank = self.key_width
        self._key_mean[slot], self._key_basis[slot] = principal_directions(keys, rank)
        self._value_mean[slot], self._value_basis[slot] = principal_directions(values, rank)
        self._fitted.add(slot)

    def forget(self, slot):
        self._fitted.discard(slot)

    def encode(self, keys, values, slots):
        return (
            _into(keys, self._key_mean[slots], self._key_basis[slots]),
            _into(values, self._value_mean[slots], self._value_basis[slots]),
        )

    def decode(self, keys, values, slots):
        return (
            _out_of(keys, self._key_mean[slots], self._key_basis[slots]),
            _out_of(values, self._value_mean[slots], self._value_basis[slots]),
        )

    def absorb(self, query, slots):
        heads = self._by_group(query)
        bias = torch.matmul(heads, self._key_mean[slots].unsqueeze(3))
        return self._by_head(torch.matmul(heads, self._key_basis[slots]), query), self._by_head(
            bias, query
        ).squeeze(3)

    def emit(self, out, slots):
        basis = self._value_basis[slots].transpose(2, 3)
        full = torch.matmul(self._by_group(out), basis) + self._value_mean[slots].unsqueeze(2)
        return self._by_head(full, out).to(out.dtype)

    def tensors(self):
        return [self._key_mean, self._key_basis, self._value_mean, self._value_basis]

    def _by_group(self, x: torch.Tensor) -> torch.Tensor:
        """[n, sq, np, w] -> [n, ng, sq * g, w], float32."""
        num_groups = self._key_mean.shape[1]
        return x.float().unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)

    def _by_head(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[n, ng, sq * g, w] -> [n, sq, np, w], sq as in `like`."""
        return x.unflatten(2, (like.shape[1], -1)).transpose(1, 2).flatten(2, 3)


def _empty(num_slots: int, num_groups: int, width: int, rank: int, kv: KVShape):
    """Means and bases of all sequences."""
    return (
        torch.zeros(num_slots, num_groups, width, device=kv.device),
        torch.zeros(num_slots, num_groups, width, rank, device=kv.device),
    )


def _into(x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[ng, c, S, w] by means [c, ng, w] and bases [c, ng, w, r] -> [ng, c, S, r]."""
    centred = x.float() - mean.transpose(0, 1).unsqueeze(2)
    return torch.matmul(centred, basis.transpose(0, 1))


def _out_of(x: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """[ng, c, S, r] -> [ng, c, S, w]."""
    return torch.matmul(x.float(), basis.permute(1, 0, 3, 2)) + mean.transpose(0, 1).unsqueeze(2)
