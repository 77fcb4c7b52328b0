"""The lossless selector."""

from pikv_megatron.selector.base import PageSelector


class AllPagesSelector(PageSelector):
    """Every page of a visited shard is read."""

    def select(self, query, directory, shards):
        return None
