"""The routers that `PiKVConfig.router` can name."""

from pikv_megatron.options import family
from pikv_megatron.router.all_shards import AllShardsOptions
from pikv_megatron.router.cache_aware import CacheAwareOptions
from pikv_megatron.router.eplb import EPLBOptions
from pikv_megatron.router.hash import HashOptions
from pikv_megatron.router.hierarchical import HierarchicalOptions
from pikv_megatron.router.load_balanced import LoadBalancedOptions
from pikv_megatron.router.reinforced import ReinforcedOptions
from pikv_megatron.router.round_robin import RoundRobinOptions
from pikv_megatron.router.top_k import TopKOptions

Router = family(
    AllShardsOptions, HashOptions, RoundRobinOptions, TopKOptions, LoadBalancedOptions,
    CacheAwareOptions, EPLBOptions, ReinforcedOptions, HierarchicalOptions,
)
