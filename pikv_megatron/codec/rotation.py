"""A Hadamard rotation of stored keys and values, which spreads outliers over all channels.

Rotations change no product: the query is rotated as the keys were, the output back.

Legend: r a stored width.
"""

import torch

from pikv_megatron.codec.transform.base import KVTransform
from pikv_megatron.types import KVShape


class RotatedTransform(KVTransform):
    """A transform and a rotation behind it.

    Args:
        kv: tokens as computed.
        inner: the transform; None stores tokens in their own widths.
    """

    def __init__(self, kv: KVShape, inner: KVTransform | None):
        self._inner = inner
        source = kv if inner is None else inner
        self.key_width, self.value_width = source.key_width, source.value_width
        if inner is not None:
            self.pooled, self.learns = inner.pooled, inner.learns
        self._key_rotation = hadamard(self.key_width).to(kv.device)
        self._value_rotation = self._key_rotation
        if self.value_width != self.key_width:
            self._value_rotation = hadamard(self.value_width).to(kv.device)

    def is_fitted(self, slot):
        return self._inner is None or self._inner.is_fitted(slot)

    def fit(self, slot, keys, values):
        self._inner.fit(slot, keys, values)

    def forget(self, slot):
        if self._inner is not None:
            self._inner.forget(slot)

    def encode(self, keys, values, slots):
        if self._inner is not None:
            keys, values = self._inner.encode(keys, values, slots)
        return keys.float() @ self._key_rotation, values.float() @ self._value_rotation

    def decode(self, keys, values, slots):
        keys, values = keys.float() @ self._key_rotation.T, values.float() @ self._value_rotation.T
        return (keys, values) if self._inner is None else self._inner.decode(keys, values, slots)

    def absorb(self, query, slots):
        bias = None
        if self._inner is not None:
            query, bias = self._inner.absorb(query, slots)
        return query.float() @ self._key_rotation, bias

    def emit(self, out, slots):
        out = (out.float() @ self._value_rotation.T).to(out.dtype)
        return out if self._inner is None else self._inner.emit(out, slots)

    def tensors(self):
        own = [self._key_rotation]
        if self._value_rotation is not self._key_rotation:
            own.append(self._value_rotation)
        return own if self._inner is None else own + self._inner.tensors()


def hadamard(width: int) -> torch.Tensor:
    """An orthonormal matrix [r, r] of +-1, as large blocks of it as powers of two divide r into.

    Raises:
        ValueError: the width is odd.

    Example:
        Width 6: three blocks (1, 1; 1, -1) / sqrt(2) on the diagonal.
    """
    block = width & -width
    if block == 1:
        raise ValueError(
            f"codec.rotation hadamard needs an even stored width, and {width} is odd: leave it "
            "out, or choose another rank"
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (width // block))
