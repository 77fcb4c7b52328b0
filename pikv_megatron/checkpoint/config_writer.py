"""`config.json` of a Hugging Face directory, written from an `Architecture`."""

import json
from pathlib import Path
from typing import Any

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.huggingface_config import FAMILIES, QK_LAYERNORM
from pikv_megatron.checkpoint.rotary import LLAMA3_CONSTANTS, RotaryScaling


def write_config(architecture: Architecture, directory: Path, dtype: str) -> None:
    """Write the `config.json` that `read_architecture` and transformers read back."""
    config = _huggingface_fields(architecture) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _huggingface_fields(architecture: Architecture) -> dict[str, Any]:
    family = architecture.family
    names = {ours: theirs for theirs, ours in FAMILIES.items()}
    return {
        "architectures": [names[family]],
        "model_type": family,
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "num_experts_per_tok": architecture.moe_router_topk,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_parameters": _rope_parameters(architecture),
        "rope_theta": architecture.rotary_base,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_sequence_length,
        "tie_word_embeddings": architecture.tie_embeddings,
        "bos_token_id": architecture.bos_id,
        "eos_token_id": _one_or_list(architecture.eos_ids),
        "hidden_act": "silu",
    } | _head_dim(architecture) | _family_fields(architecture)


def _head_dim(architecture: Architecture) -> dict[str, int]:
    # Some releases take a null for a width: leave the key out where the default holds.
    return {} if architecture.kv_channels is None else {"head_dim": architecture.kv_channels}


def _family_fields(architecture: Architecture) -> dict[str, Any]:
    _check_family(architecture)
    normalised = {"norm_topk_prob": not architecture.moe_router_pre_softmax}
    width = architecture.moe_ffn_hidden_size
    if architecture.family == "mixtral":
        return {
            "num_local_experts": architecture.num_experts,
            "intermediate_size": width,
            "sliding_window": None,
        }
    if architecture.family == "olmoe":
        return normalised | {
            "num_experts": architecture.num_experts,
            "intermediate_size": width,
            "clip_qkv": architecture.clip_qkv,
        }
    return normalised | {
        "num_experts": architecture.num_experts,
        "moe_intermediate_size": width,
        "intermediate_size": architecture.ffn_hidden_size or width,
        "mlp_only_layers": list(architecture.dense_layers),
        "decoder_sparse_step": 1,
    }


def _check_family(architecture: Architecture) -> None:
    """A family's `config.json` cannot say everything that an `Architecture` can."""
    family = architecture.family
    fixed = {"normalization": "RMSNorm", "qk_layernorm": QK_LAYERNORM[family]}
    if family == "mixtral":
        fixed |= {"moe_router_pre_softmax": False}
    if family != "qwen3_moe":
        fixed |= {"dense_layers": ()}
    if family != "olmoe":
        fixed |= {"clip_qkv": None}
    elif architecture.head_dim * architecture.num_attention_heads != architecture.hidden_size:
        raise ValueError(f"kv_channels = {architecture.kv_channels} cannot be written for olmoe")
    for field, value in fixed.items():
        if getattr(architecture, field) != value:
            raise ValueError(
                f"{field} = {getattr(architecture, field)!r} cannot be written for {family}, "
                f"which has {value!r}"
            )


def _rope_parameters(architecture: Architecture) -> dict[str, Any]:
    scaling = architecture.rotary_scaling
    theta = {"rope_theta": architecture.rotary_base}
    if scaling is None:
        return theta | {"rope_type": "default"}
    named = theta | {"rope_type": scaling.kind, "factor": scaling.factor}
    extra = {"linear": {}, "llama3": LLAMA3_CONSTANTS, "yarn": _yarn_parameters(scaling)}
    return named | extra[scaling.kind]


def _yarn_parameters(scaling: RotaryScaling) -> dict[str, Any]:
    parameters = {
        "original_max_position_embeddings": scaling.original_max_positions,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
        "truncate": scaling.round_correction_range,
    }
    return {field: value for field, value in parameters.items() if value is not None}


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
