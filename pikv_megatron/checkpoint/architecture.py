"""What is needed to build a Mixture-of-Experts GPT model, with or without a checkpoint at hand."""

from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.latent_sizes import LatentSizes
from pikv_megatron.checkpoint.rotary import RotaryScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Architecture(BaseModel):
    """Sizes and choices of a model, under Megatron-Core's names. Unknown keys are refused.

    `configs/model/*.yaml` explain every field. `family` decides only how tensors are named in a
    Hugging Face directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str = "mixtral"
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    kv_channels: PositiveInt | None = None
    latent_attention: LatentSizes | None = None
    num_experts: PositiveInt
    moe_router_topk: PositiveInt = 2
    moe_router_pre_softmax: bool = False
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_expert_bias: bool = False
    moe_router_num_groups: PositiveInt | None = None
    moe_router_group_topk: PositiveInt | None = None
    moe_router_group_judges: PositiveInt | None = None
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    moe_ffn_hidden_size: PositiveInt
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    moe_shared_expert_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    ffn_hidden_size: PositiveInt | None = None
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    qk_layernorm: Literal["none", "head", "projection"] = "none"
    clip_qkv: float | None = Field(default=None, gt=0)
    linear_bias: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    attention_sink: bool = False
    sliding_window: PositiveInt | None = None
    sliding_layers: tuple[int, ...] = ()
    activation: Literal["silu", "clamped_swiglu"] = "silu"
    activation_limit: float | None = Field(default=None, gt=0)
    rotary_base: float = Field(default=10000.0, gt=1)
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    rotary_scaling: RotaryScaling | None = None
    vocab_size: PositiveInt
    max_sequence_length: PositiveInt
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Architecture":
        """Read a description without weights, such as `configs/model/demo.yaml`."""
        fields = yaml.safe_load(Path(path).read_text())
        if not isinstance(fields, dict):
            raise ValueError(f"{path} must hold keys and values, one a line")
        return cls(**fields)

    @property
    def head_dim(self) -> int:
        """Width of one attention head, of its output where that is another one's."""
        if self.latent_attention is not None:
            return self.latent_attention.v_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type in which the checkpoint stores its weights."""
        return DTYPES[self.dtype]

    @property
    def is_moe_layer(self) -> list[bool]:
        """For every layer, whether it has experts or one dense block."""
        return [layer not in self.dense_layers for layer in range(self.num_layers)]

    @field_validator("family")
    @classmethod
    def _known_family(cls, name: str) -> str:
        if name not in FAMILIES:
            raise ValueError(f"family = {name!r} is not known, only {', '.join(FAMILIES)} are")
        return name

    @model_validator(mode="after")
    def _check(self) -> "Architecture":
        self._check_heads()
        self._check_experts()
        return self

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads % groups:
            raise ValueError(f"num_query_groups {groups} must divide num_attention_heads {heads}")
        if self.latent_attention is not None:
            self._check_latent()
        elif self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads {heads} must divide hidden_size {self.hidden_size}, "
                "or kv_channels must be set"
            )
        if self.head_dim % 2:
            raise ValueError(f"kv_channels {self.head_dim} must be even: rotary pairs need it")

        if bool(self.sliding_layers) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_layers {self.sliding_layers} and sliding_window {self.sliding_window} "
                "need each other"
            )
        self._check_layers("sliding_layers")
        if self.linear_bias and not (self.qkv_bias and self.attention_output_bias):
            raise ValueError("linear_bias needs qkv_bias and attention_output_bias")
        if (self.activation == "clamped_swiglu") != (self.activation_limit is not None):
            raise ValueError(
                f"activation {self.activation} and activation_limit {self.activation_limit} do "
                "not fit"
            )
        if self.clip_qkv is not None and self.qk_layernorm != "projection":
            raise ValueError(f"clip_qkv = {self.clip_qkv} needs qk_layernorm = 'projection'")

    def _check_latent(self) -> None:
        """Megatron-Core's latent attention has its own norms, no biases, and plain RoPE or YaRN."""
        if self.num_query_groups != self.num_attention_heads:
            raise ValueError(
                f"num_query_groups {self.num_query_groups} must be num_attention_heads "
                f"{self.num_attention_heads} with latent_attention"
            )
        other = {
            "kv_channels": None, "qk_layernorm": "none", "linear_bias": False, "qkv_bias": False,
            "attention_output_bias": False, "attention_sink": False, "sliding_window": None,
            "rotary_percent": 1.0,
        }
        for field, allowed in other.items():
            if getattr(self, field) != allowed:
                raise ValueError(
                    f"{field} = {getattr(self, field)!r} is not supported with latent_attention"
                )
        scaling = self.rotary_scaling
        if scaling is not None and (
            scaling.kind != "yarn" or scaling.attention_factor is not None
            or not scaling.round_correction_range
        ):
            raise ValueError(
                f"rotary_scaling: {scaling.kind} is not supported with latent_attention; yarn is, "
                "without an attention_factor and with a rounded range"
            )

    @property
    def _is_softmax_of_chosen(self) -> bool:
        return self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax

    def _check_experts(self) -> None:
        if self.moe_router_topk > self.num_experts:
            raise ValueError(
                f"moe_router_topk {self.moe_router_topk} exceeds num_experts {self.num_experts}"
            )
        if self.moe_router_topk == 1 and self._is_softmax_of_chosen:
            raise ValueError(
                "moe_router_topk = 1 needs moe_router_pre_softmax = true: a softmax over one "
                "expert is constant"
            )
        if self.moe_router_expert_bias and self.moe_router_score_function != "sigmoid":
            raise ValueError(
                "moe_router_expert_bias needs moe_router_score_function = 'sigmoid'"
            )
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if (groups is None) != (chosen is None) or self.num_experts % (groups or 1):
            raise ValueError(
                f"moe_router_num_groups {groups} must divide num_experts {self.num_experts}, and "
                f"needs moe_router_group_topk, which is {chosen}"
            )
        if groups is not None and self.moe_router_topk > chosen * (self.num_experts // groups):
            raise ValueError(
                f"moe_router_topk {self.moe_router_topk} exceeds the experts of "
                f"moe_router_group_topk {chosen} groups"
            )
        self._check_judges()
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            raise ValueError("moe_shared_expert_gate needs moe_shared_expert_intermediate_size")
        self._check_layers("dense_layers")
        if self.dense_layers and self.ffn_hidden_size is None:
            raise ValueError("dense_layers need ffn_hidden_size, their width")

    def _check_judges(self) -> None:
        judges, groups = self.moe_router_group_judges, self.moe_router_num_groups
        if judges is None:
            return
        if groups is None or judges > self.num_experts // groups:
            raise ValueError(
                f"moe_router_group_judges {judges} must be among the experts of a group, of which "
                f"moe_router_num_groups {groups} makes some of {self.num_experts}"
            )
        if self._is_softmax_of_chosen:
            raise ValueError(
                "moe_router_group_judges needs scores of all experts: moe_router_pre_softmax or "
                "sigmoid scores"
            )

    def _check_layers(self, field: str) -> None:
        outside = [layer for layer in getattr(self, field) if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(f"{field} {outside} are not among {self.num_layers} layers")
