"""The lossless retention policy."""

from typing import Literal

from pikv_megatron.retention.base import RetentionOptions


class KeepAllOptions(RetentionOptions):
    """Every page stays until its sequence ends: lossless."""

    name: Literal["all"] = "all"

    def build(self, fitted=None):
        return None
