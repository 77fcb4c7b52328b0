"""Tokens on their way to their shards, in fewer bits a number.

What an owner packs anyway need not travel as computed. Values are quantised token by token, on the
wire as in pages, so they travel as their pages will store them. Keys have a scale a channel and
page, which a token on its way does not know: they travel in 8 bits, of a scale each, and lose far
less than their page will.

Legend: t tokens, ng KV heads, w width, G groups of channels.
"""

from typing import NamedTuple

from torch import Tensor

from pikv_megatron.ops.packing import pack, quantise, unpack
from pikv_megatron.types import KVShape

KEY_GROUP = 64  # channels, at most
SCALE_BYTES = 4  # of a scale and a zero point


class WireSide(NamedTuple):
    """How keys, or values, travel.

    Attributes:
        bits: of a number, 8, 4, 3 or 2.
        num_groups: G, scales of a head.
    """

    bits: int
    num_groups: int

    def pack(self, x: Tensor) -> list[Tensor]:
        """[t, ng, w] -> codes [t, ng, w * bits / 8], scales and zero points [t, ng, G]."""
        codes, scale, zero = quantise(x.unflatten(2, (self.num_groups, -1)), self.bits)
        codes = codes.flatten(2)
        if self.bits < 8:
            codes = pack(codes.unsqueeze(3), self.bits).squeeze(3)
        return [codes, scale.squeeze(3), zero.squeeze(3)]

    def unpack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The inverse, [t, ng, w], float32, but for what `pack` loses."""
        if self.bits < 8:
            codes = unpack(codes.unsqueeze(3), self.bits).squeeze(3)
        groups = codes.unflatten(2, (self.num_groups, -1)).float()
        return (groups * scale.float().unsqueeze(3) + zero.float().unsqueeze(3)).flatten(2)

    def head_bytes(self, width: int) -> int:
        """Of a head."""
        return width * self.bits // 8 + self.num_groups * SCALE_BYTES


class Wire(NamedTuple):
    """How the tokens of a layer travel; None: as computed."""

    keys: WireSide | None = None
    values: WireSide | None = None

    def token_bytes(self, kv: KVShape) -> int:
        """Of a token's keys and values."""
        return sum(
            ng * (width * kv.dtype.itemsize if side is None else side.head_bytes(width))
            for side, (ng, width) in zip(self, kv.heads.values())
        )
