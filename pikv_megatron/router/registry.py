"""Routers by the name they have in `PiKVConfig.router`."""

from pikv_megatron.router.all_shards import AllShardsRouter

ROUTERS = {"all": AllShardsRouter}
