"""`config.json` of a Hugging Face directory, written from an `Architecture`."""

import json
from pathlib import Path
from typing import Any

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.huggingface_config import architecture_of
from pikv_megatron.checkpoint.rotary import LLAMA3_CONSTANTS, RotaryScaling


def write_config(architecture: Architecture, directory: Path, dtype: str) -> None:
    """Write the `config.json` that `read_architecture` and transformers read back."""
    config = _huggingface_fields(architecture)
    _check_readable(architecture, config | {"torch_dtype": architecture.dtype})
    config |= {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _huggingface_fields(architecture: Architecture) -> dict[str, Any]:
    family = FAMILIES[architecture.family]
    return {
        "architectures": [family.class_name],
        "model_type": family.name,
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
    } | _head_dim(architecture) | family.write(architecture)


def _head_dim(architecture: Architecture) -> dict[str, int]:
    # Some releases take a null for a width: leave the key out where the default holds.
    return {} if architecture.kv_channels is None else {"head_dim": architecture.kv_channels}


def _check_readable(architecture: Architecture, config: dict[str, Any]) -> None:
    """A family's `config.json` cannot say everything that an `Architecture` can."""
    try:
        said = architecture_of(config)
    except ValueError as error:
        raise ValueError(f"cannot be written for {architecture.family}: {error}") from error
    for field, value in architecture:
        if getattr(said, field) != value:
            raise ValueError(
                f"{field} = {value!r} cannot be written for {architecture.family}, which has "
                f"{getattr(said, field)!r}"
            )


def _rope_parameters(architecture: Architecture) -> dict[str, Any]:
    scaling = architecture.rotary_scaling
    theta = {"rope_theta": architecture.rotary_base}
    if FAMILIES[architecture.family].has_partial_rotary:
        theta["partial_rotary_factor"] = architecture.rotary_percent
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
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.round_correction_range,
    }
    return {field: value for field, value in parameters.items() if value is not None}


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
