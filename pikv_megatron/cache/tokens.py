"""The tokens that leave a stream window for their shards."""

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.parallel.packet import pack_rows, unpack_rows


class TokenBlock(NamedTuple):
    """Tokens on their way to shards, those of a sequence in the order of their positions.

    Attributes:
        keys: [ng, t, w_k], after RoPE.
        values: [ng, t, w_v]; None where they are columns of the keys.
        slot: [t], int64, sequence slot in the expert-parallel group; -1 marks padding.
        shard: [t], int64.
        position: [t], int64.
        earlier_shards: [t], int64, bit s is set where a replica of lower order lies in shard s.
        score: [t], float32, by a retention policy; None where none asks.
    """

    keys: Tensor
    values: Tensor | None
    slot: Tensor
    shard: Tensor
    position: Tensor
    earlier_shards: Tensor
    score: Tensor | None = None

    def packed(self) -> Tensor:
        """[t, bytes], uint8, for the journey."""
        return pack_rows(self._by_token())

    def unpacked(self, rows: Tensor) -> "TokenBlock":
        """The block that rows [t', bytes] hold, of the same types and widths."""
        header, *parts = unpack_rows(rows, self._by_token())
        score = None if self.score is None else parts.pop()
        keys, values = *(part.transpose(0, 1) for part in parts), *[None] * (2 - len(parts))
        return TokenBlock(keys, values, *header.unbind(1), score)

    def _by_token(self) -> list[Tensor]:
        header = torch.stack([self.slot, self.shard, self.position, self.earlier_shards], dim=1)
        parts = [self.keys] if self.values is None else [self.keys, self.values]
        scores = [] if self.score is None else [self.score]
        return [header, *(part.transpose(0, 1) for part in parts), *scores]
