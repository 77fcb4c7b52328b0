"""Keys that are stored before RoPE.

RoPE turns each pair of a key's channels at a speed of its own, by the key's position. What is alike
in all keys, their mean above all, differs from token to token once it is turned: the numbers of a
channel then spread over a wider range, and their scale is coarser. So keys of few bits gain by
being stored before RoPE, most where they have a large mean; `BENCHMARKS.md` says how much. They
have to be turned when they are read, which kernels do in registers, and which takes time: so it is
an option.

A low-rank map of keys would gain more, and cannot: it is absorbed into the query, from which a
rotation between the two would keep it.
"""

import torch

from pikv_megatron.ops.turn_keys import angle_table, turn_keys
from pikv_megatron.types import KeyTurn, KVShape


class KeyAngles:
    """The angles of a layer's positions, once the model has told its frequencies.

    Args:
        kv: tokens as computed.
        num_positions: that tokens can have.

    Attributes:
        table: see `ops.turn_keys.angle_table`.
        is_known: the frequencies were told.
    """

    def __init__(self, kv: KVShape, num_positions: int):
        self._num_positions = num_positions
        frequencies = torch.zeros(kv.key_width // 2, device=kv.device)
        self.table = angle_table(frequencies, num_positions)
        self.is_known = False

    def learn(self, frequencies: torch.Tensor) -> None:
        """Angles of position 1, [w / 2]; channels from w on do not turn."""
        self.table = angle_table(frequencies, self._num_positions)
        self.is_known = True

    def before(self, keys: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Keys [ng, c, S, hn] at positions [c, S], as they were before RoPE, float32."""
        assert self.is_known, "keys came before the frequencies of the model's RoPE"
        return turn_keys(keys, position, self.table, back=True)

    def after(self, keys: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The inverse of `before`."""
        return turn_keys(keys, position, self.table)

    def turn(self, position: torch.Tensor, rows: torch.Tensor) -> KeyTurn:
        """What turns listed pages, whose positions are the rows [n, m] of [q, S]."""
        return KeyTurn(position, rows, self.table)
