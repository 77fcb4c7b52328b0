"""The families that there are."""

from pikv_megatron.checkpoint.families.base import Family
from pikv_megatron.checkpoint.families.mixtral import Mixtral
from pikv_megatron.checkpoint.families.olmoe import Olmoe
from pikv_megatron.checkpoint.families.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Mixtral(), Qwen3Moe(), Olmoe())
}
