"""`config.json` of a Hugging Face directory, read into an `Architecture`."""

import json
from pathlib import Path
from typing import Any

from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.rotary import rotary_scaling

FAMILIES = {
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
}
DEFAULT_ROTARY_BASE = {"mixtral": 1e6, "qwen3_moe": 1e4, "olmoe": 1e4}
QK_LAYERNORM = {"mixtral": "none", "qwen3_moe": "head", "olmoe": "projection"}


def read_architecture(directory: str | Path) -> Architecture:
    """Read `config.json` of a Mixtral, Qwen3-MoE or OLMoE directory.

    Raises:
        ValueError: the file is missing or broken, or asks for something that is not supported.
    """
    path = Path(directory) / "config.json"
    config = read_json(path)
    try:
        return _architecture(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, naming the file in every error."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: is {path.parent} a Hugging Face directory?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id, or list of them, or none, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _architecture(config: dict[str, Any]) -> Architecture:
    family = _family(config)
    _refuse_unsupported(config, family)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    max_positions = _required(config, "max_position_embeddings")
    base = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROTARY_BASE[family]
    return Architecture(
        family=family,
        num_layers=_required(config, "num_hidden_layers"),
        hidden_size=_required(config, "hidden_size"),
        num_attention_heads=_required(config, "num_attention_heads"),
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        kv_channels=config.get("head_dim"),
        **_expert_fields(config, family),
        layernorm_epsilon=_required(config, "rms_norm_eps"),
        qk_layernorm=QK_LAYERNORM[family],
        clip_qkv=config.get("clip_qkv"),
        rotary_base=base,
        rotary_scaling=rotary_scaling(rope, max_positions),
        vocab_size=_required(config, "vocab_size"),
        max_sequence_length=max_positions,
        tie_embeddings=config.get("tie_word_embeddings", False),
        bos_id=config.get("bos_token_id"),
        eos_ids=token_ids(config.get("eos_token_id")),
        dtype=_dtype(config),
    )


def _family(config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(f"architectures = {names} is not supported, only {', '.join(FAMILIES)} are")


def _expert_fields(config: dict[str, Any], family: str) -> dict[str, Any]:
    # transformers 5 writes num_local_experts where earlier releases wrote num_experts.
    field = "num_local_experts" if "num_local_experts" in config else "num_experts"
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    dense = _dense_layers(config) if family == "qwen3_moe" else ()
    return dict(
        num_experts=_required(config, field),
        moe_router_topk=_required(config, "num_experts_per_tok"),
        moe_router_pre_softmax=not config.get("norm_topk_prob", family == "mixtral"),
        moe_ffn_hidden_size=_required(config, width),
        dense_layers=dense,
        ffn_hidden_size=_required(config, "intermediate_size") if dense else None,
    )


def _dense_layers(config: dict[str, Any]) -> tuple[int, ...]:
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(_required(config, "num_hidden_layers"))
    return tuple(layer for layer in layers if layer in listed or (layer + 1) % step)


def _refuse_unsupported(config: dict[str, Any], family: str) -> None:
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config is not supported: give the unquantised checkpoint")
    if config.get("attention_bias"):
        raise ValueError("attention_bias = true is not supported: it must be false")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act = {config['hidden_act']!r} is not supported, only 'silu' is")
    window = config.get("sliding_window")
    used = family == "mixtral" or config.get("use_sliding_window")
    if used and window is not None and window < _required(config, "max_position_embeddings"):
        raise ValueError(
            f"sliding_window = {window} is not supported: set it to null, or lower "
            "max_position_embeddings to it"
        )


def _dtype(config: dict[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r} is not supported, only {', '.join(DTYPES)} are")
    return name


def _required(config: dict[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ValueError(f"{field} is missing")
    return config[field]
