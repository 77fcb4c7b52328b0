"""The lossless router."""

from pikv_megatron.router.base import KVRouter


class AllShardsRouter(KVRouter):
    """Every query visits every shard, so attention is exact."""

    def visit(self, query, directory):
        return None
