"""The lossless retention policy."""

from typing import ClassVar, Literal

from pikv_megatron.retention.base import RetentionOptions


class KeepAllOptions(RetentionOptions):
    """Every page stays until its sequence ends: lossless."""

    name: Literal["all"] = "all"

    takes_budget: ClassVar[bool] = False

    def build(self, fitted=None):
        return None
