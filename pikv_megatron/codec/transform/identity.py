"""No transform."""

from typing import Literal

from pikv_megatron.codec.transform.base import TransformOptions


class IdentityOptions(TransformOptions):
    """Keys and values in their own widths: lossless."""

    name: Literal["identity"] = "identity"

    @property
    def leaves_keys(self):
        return True

    def build(self, kv, num_slots, moments=None, num_bases=1):
        return None

    def key_map(self, kv, num_slots, moments, num_bases=1):
        return IdentityMap(kv.key_width)

    def value_map(self, kv, num_slots, moments, num_bases=1):
        return IdentityMap(kv.value_width)


class IdentityMap:
    """Keys, or values, that stay as they are where the others do not: see `LinearMap`."""

    def __init__(self, width: int):
        self.rank = width

    def is_fitted(self, slot):
        return True

    def fit(self, slot, x):
        """There is nothing to learn."""

    def forget(self, slot):
        """There is nothing to forget."""

    def tensors(self):
        return []

    def encode(self, x, slots):
        return x

    def decode(self, x, slots):
        return x

    def absorb(self, query, slots):
        return query, None

    def emit(self, out, slots):
        return out
