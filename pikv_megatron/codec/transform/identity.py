"""No transform."""

from typing import Literal

from pikv_megatron.codec.transform.base import TransformOptions


class IdentityOptions(TransformOptions):
    """Keys and values in their own widths: lossless."""

    name: Literal["identity"] = "identity"

    def build(self, kv, num_slots, moments=None):
        return None
