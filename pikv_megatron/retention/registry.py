"""The retention policies that `PiKVConfig.retention` can name."""

from pikv_megatron.options import family
from pikv_megatron.retention.adakv import AdaKVOptions
from pikv_megatron.retention.duo import DuoOptions
from pikv_megatron.retention.expected_attention import ExpectedAttentionOptions
from pikv_megatron.retention.flexgen import FlexGenOptions
from pikv_megatron.retention.h2o import H2OOptions
from pikv_megatron.retention.keep_all import KeepAllOptions
from pikv_megatron.retention.kvpress import KVPressOptions
from pikv_megatron.retention.lru import LRUOptions
from pikv_megatron.retention.lru_plus import LRUPlusOptions
from pikv_megatron.retention.quest import QuestOptions
from pikv_megatron.retention.snapkv import SnapKVOptions
from pikv_megatron.retention.streaming import StreamingOptions
from pikv_megatron.retention.token_eviction import TokenEvictionOptions

Retention = family(
    KeepAllOptions, H2OOptions, SnapKVOptions, StreamingOptions, LRUOptions, LRUPlusOptions,
    AdaKVOptions, ExpectedAttentionOptions, QuestOptions, DuoOptions, TokenEvictionOptions,
    FlexGenOptions, KVPressOptions,
)
