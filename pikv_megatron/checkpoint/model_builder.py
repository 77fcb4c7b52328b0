"""Builds Megatron-Core's GPTModel from an `Architecture`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.block_spec import has_transformer_engine, layer_spec
from pikv_megatron.transformer.plain_linears import make_plain
from pikv_megatron.runtime.cpu_fallback import apply_cpu_fallback

__all__ = ["GPTConfig", "build_model", "identity", "layer_spec", "transformer_config"]

SPLIT_FIELDS = (  # over tensor-parallel ranks
    "num_query_groups", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "ffn_hidden_size",
)
SpecTransform = Callable[[TransformerBlockSubmodules], TransformerBlockSubmodules]


def identity(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The stock layer spec."""
    return spec


@dataclass
class GPTConfig(TransformerConfig):
    """Megatron-Core's config with what it reads of one, or this package does, but declares not.

    Attributes:
        clip_qkv: bound on queries, keys and values (OLMoE).
        yarn_rotary_scaling_factor and the other `yarn_` fields: see `RotaryScaling`.
    """

    clip_qkv: float | None = None
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int | None = None
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool = True


def transformer_config(
    architecture: Architecture,
    pg_collection: ProcessGroupCollection,
    dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron-Core's config for inference; `overrides` sets fields of it, for training say.

    Raises:
        ValueError: the parallel sizes do not divide the architecture's.
    """
    tensor_parallel, expert_parallel = pg_collection.tp.size(), pg_collection.ep.size()
    _check_parallel_sizes(architecture, pg_collection)
    fields = dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size or architecture.moe_ffn_hidden_size,
        num_moe_experts=architecture.num_experts,
        moe_router_topk=architecture.moe_router_topk,
        moe_router_pre_softmax=architecture.moe_router_pre_softmax,
        moe_router_score_function=architecture.moe_router_score_function,
        moe_router_enable_expert_bias=architecture.moe_router_expert_bias,
        moe_router_num_groups=architecture.moe_router_num_groups,
        moe_router_group_topk=architecture.moe_router_group_topk,
        moe_router_topk_scaling_factor=architecture.moe_router_topk_scaling_factor,
        # Sigmoid scores lie close together; such models are trained with exact ones.
        moe_router_dtype="fp32" if architecture.moe_router_score_function == "sigmoid" else None,
        moe_ffn_hidden_size=architecture.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=architecture.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=architecture.moe_shared_expert_gate,
        moe_layer_freq=_moe_layer_freq(architecture),
        moe_token_dispatcher_type="alltoall",  # the one that takes uneven rows per rank
        moe_router_load_balancing_type="none",
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.layernorm_epsilon,
        qk_layernorm=architecture.qk_layernorm != "none",
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        add_bias_linear=architecture.linear_bias,
        softmax_type="learnable" if architecture.attention_sink else "vanilla",
        **_activation_fields(architecture),
        **_window_fields(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.auto if has_transformer_engine() else AttnBackend.local,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=tensor_parallel,
    )
    fields |= dict(overrides or {})
    if architecture.latent_attention is not None:
        return MLATransformerConfig(**_latent_fields(architecture) | fields)
    return GPTConfig(clip_qkv=architecture.clip_qkv, **_yarn_fields(architecture) | fields)


def build_model(
    architecture: Architecture,
    pg_collection: ProcessGroupCollection,
    dtype: torch.dtype = torch.float32,
    spec_transform: SpecTransform = identity,
    overrides: Mapping[str, Any] | None = None,
) -> GPTModel:
    """Build the model in evaluation mode, with random weights.

    Args:
        architecture: what to build.
        pg_collection: from `init_process_groups`; gives the parallel sizes.
        dtype: type of the weights and of the computation.
        spec_transform: gets the stock block spec and returns the one to build.
        overrides: fields of Megatron-Core's config to set, for training say.
    """
    apply_cpu_fallback()
    config = transformer_config(architecture, pg_collection, dtype, overrides)
    model = GPTModel(
        config,
        spec_transform(layer_spec(architecture)),
        vocab_size=padded_vocab_size(architecture, pg_collection),
        max_sequence_length=architecture.max_sequence_length,
        share_embeddings_and_output_weights=architecture.tie_embeddings,
        pg_collection=pg_collection,
        **_rotary_arguments(architecture),
    )
    for parameter in model.parameters():  # torch's norms make float32 weights, whatever is asked
        parameter.data = parameter.data.to(dtype)
    make_plain(model.output_layer)
    return model.eval()


def padded_vocab_size(architecture: Architecture, pg_collection: ProcessGroupCollection) -> int:
    """The vocabulary, rounded up so that tensor-parallel ranks hold equal parts."""
    tensor_parallel = pg_collection.tp.size()
    return -(-architecture.vocab_size // tensor_parallel) * tensor_parallel


def _check_parallel_sizes(architecture: Architecture, pg: ProcessGroupCollection) -> None:
    tensor_parallel, expert_parallel = pg.tp.size(), pg.ep.size()
    if pg.pp.size() > 1:
        raise ValueError(f"pipeline parallel size {pg.pp.size()} is not supported: it must be 1")
    if architecture.linear_bias and tensor_parallel > 1:
        raise ValueError(
            f"tensor parallel size {tensor_parallel} is not supported with linear_bias: every rank "
            "would add the experts' bias; set it to 1"
        )
    latent = architecture.latent_attention
    split = {field: getattr(architecture, field) for field in SPLIT_FIELDS}
    if latent is not None:
        split |= {"q_lora_rank": latent.q_lora_rank, "latent row": latent.row_width}
    for field, value in split.items():
        if value is not None and value % tensor_parallel:
            raise ValueError(
                f"tensor parallel size {tensor_parallel} must divide {field} {value}"
            )
    if architecture.num_experts % expert_parallel:
        raise ValueError(
            f"expert parallel size {expert_parallel} must divide num_experts "
            f"{architecture.num_experts}"
        )


def _activation_fields(architecture: Architecture) -> dict[str, Any]:
    if architecture.activation == "silu":
        return {"activation_func": F.silu}
    return {
        "activation_func": quick_gelu,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": architecture.activation_limit,
    }


def _window_fields(architecture: Architecture) -> dict[str, Any]:
    """Megatron-Core counts the tokens beside the query's own."""
    if architecture.sliding_window is None:
        return {}
    layers = range(architecture.num_layers)
    return {
        "window_size": (architecture.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(layer in architecture.sliding_layers) for layer in layers],
    }


def _latent_fields(architecture: Architecture) -> dict[str, Any]:
    sizes, scaling = architecture.latent_attention, architecture.rotary_scaling
    fields = dict(
        q_lora_rank=sizes.q_lora_rank,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_head_dim=sizes.qk_head_dim,
        qk_pos_emb_head_dim=sizes.qk_pos_emb_head_dim,
        v_head_dim=sizes.v_head_dim,
        rotary_base=architecture.rotary_base,
    )
    if scaling is None:
        return fields | dict(rope_type="rope", rotary_scaling_factor=1.0)
    has_scales = scaling.mscale is not None
    return fields | dict(
        rope_type="yarn",
        rotary_scaling_factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_positions,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        # Without a scale of its own, yarn's is 0.1 ln(factor) + 1, and the softmax has none.
        mscale=scaling.mscale if has_scales else 1.0,
        mscale_all_dim=scaling.mscale_all_dim if has_scales else 0.0,
    )


def _moe_layer_freq(architecture: Architecture) -> int | list[int]:
    # With a list, Megatron-Core names the tensors of its checkpoints layer by layer; an even stack
    # keeps the number 1, and with it the stacked names of everybody else's checkpoints.
    return [int(moe) for moe in architecture.is_moe_layer] if architecture.dense_layers else 1


def _rotary_arguments(architecture: Architecture) -> dict[str, Any]:
    if architecture.latent_attention is not None:  # its layers have their own
        return dict(position_embedding_type="rope")
    scaling = architecture.rotary_scaling
    arguments: dict[str, Any] = dict(
        position_embedding_type="rope", rotary_base=architecture.rotary_base,
        rotary_percent=architecture.rotary_percent,
    )
    if scaling is None:
        return arguments
    by_kind = {
        "linear": dict(seq_len_interpolation_factor=scaling.factor),
        "llama3": dict(rope_scaling=True, rope_scaling_factor=scaling.factor),
        "yarn": dict(position_embedding_type="yarn"),
    }
    return arguments | by_kind[scaling.kind]


def _yarn_fields(architecture: Architecture) -> dict[str, Any]:
    scaling = architecture.rotary_scaling
    if scaling is None or scaling.kind != "yarn":
        return {}
    mscale, mscale_all_dim = scaling.mscales()
    return dict(
        yarn_rotary_scaling_factor=scaling.factor,
        yarn_original_max_position_embeddings=scaling.original_max_positions,
        yarn_beta_fast=scaling.beta_fast,
        yarn_beta_slow=scaling.beta_slow,
        yarn_mscale=mscale,
        yarn_mscale_all_dim=mscale_all_dim,
        yarn_correction_range_round_to_int=scaling.round_correction_range,
    )
