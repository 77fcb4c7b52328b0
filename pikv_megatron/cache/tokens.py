"""The tokens that leave a stream window for their shards."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.codec.wire import Wire
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

    def sent(self, wire: Wire, send: Callable[[Tensor], Tensor]) -> "TokenBlock":
        """The block that comes where `send` takes rows [t, bytes] away and gives rows [t', bytes].
        """
        header = torch.stack([self.slot, self.shard, self.position, self.earlier_shards], dim=1)
        parts = {"header": [header], "score": [] if self.score is None else [self.score]}
        for name, side in zip(("keys", "values"), wire):
            x = getattr(self, name)
            if x is not None:
                x = x.transpose(0, 1)
                parts[name] = [x] if side is None else side.pack(x)
        fields = [field for part in parts.values() for field in part]
        rows = iter(unpack_rows(send(pack_rows(fields)), fields))
        came = {name: [next(rows) for _ in part] for name, part in parts.items()}
        heads = []
        for name, side in zip(("keys", "values"), wire):
            x = came.get(name)
            if x is not None:
                x = x[0] if side is None else side.unpack(*x).to(self.keys.dtype)
                x = x.transpose(0, 1)
            heads.append(x)
        score = came["score"][0] if came["score"] else None
        return TokenBlock(*heads, *came["header"][0].unbind(1), score)
