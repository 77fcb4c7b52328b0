"""The tokens that leave a stream window for their shards."""

from typing import NamedTuple

from torch import Tensor


class TokenBlock(NamedTuple):
    """Tokens on their way to shards, those of a sequence in the order of their positions.

    Attributes:
        keys: [ng, t, hn], after RoPE.
        values: [ng, t, hn].
        slot: [t], int64, sequence slot in the expert-parallel group; -1 marks padding.
        shard: [t], int64.
        position: [t], int64.
        earlier_shards: [t], int64, bit s is set where a replica of lower order lies in shard s.
    """

    keys: Tensor
    values: Tensor
    slot: Tensor
    shard: Tensor
    position: Tensor
    earlier_shards: Tensor
