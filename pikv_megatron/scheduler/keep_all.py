"""The lossless retention policy."""

from pikv_megatron.scheduler.base import RetentionPolicy


class KeepAll(RetentionPolicy):
    """Every page stays until its sequence ends."""

    def keep(self, stats):
        return None
