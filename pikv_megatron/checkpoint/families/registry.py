"""The families that there are."""

from pikv_megatron.checkpoint.families.base import Family
from pikv_megatron.checkpoint.families.deepseek_v2 import DeepseekV2
from pikv_megatron.checkpoint.families.deepseek_v3 import DeepseekV3
from pikv_megatron.checkpoint.families.glm4_moe import Glm4Moe
from pikv_megatron.checkpoint.families.glm4_moe_lite import Glm4MoeLite
from pikv_megatron.checkpoint.families.gpt_oss import GptOss
from pikv_megatron.checkpoint.families.hy_v3 import HYV3
from pikv_megatron.checkpoint.families.minimax_m2 import MiniMaxM2
from pikv_megatron.checkpoint.families.mixtral import Mixtral
from pikv_megatron.checkpoint.families.olmoe import Olmoe
from pikv_megatron.checkpoint.families.qwen2_moe import Qwen2Moe
from pikv_megatron.checkpoint.families.qwen3_moe import Qwen3Moe

EVERY = (
    Mixtral(), Qwen2Moe(), Qwen3Moe(), Olmoe(), Glm4Moe(), MiniMaxM2(), HYV3(), GptOss(),
    DeepseekV2(), DeepseekV3(), Glm4MoeLite(),
)
FAMILIES: dict[str, Family] = {family.name: family for family in EVERY}
