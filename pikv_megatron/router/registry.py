"""The routers that `PiKVConfig.router` can name."""

from pikv_megatron.options import family
from pikv_megatron.router.all_shards import AllShardsOptions
from pikv_megatron.router.top_k import TopKOptions

Router = family(AllShardsOptions, TopKOptions)
