"""`config.json` of a Hugging Face directory, read into an `Architecture`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pikv_megatron.checkpoint.architecture import DTYPES, Architecture
from pikv_megatron.checkpoint.families.base import Family
from pikv_megatron.checkpoint.families.fields import ConfigFields
from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.families.unsupported import UNSUPPORTED
from pikv_megatron.checkpoint.json_file import read_json, token_id, token_ids
from pikv_megatron.checkpoint.quantized import weight_block_size
from pikv_megatron.checkpoint.rotary import rotary_scaling

CONFIG = "config.json"


def read_architecture(directory: str | Path) -> Architecture:
    """Read `config.json` of a directory of one of `FAMILIES`.

    Raises:
        ValueError: the file is missing or broken, or asks for something that is not supported.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    try:
        return architecture_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that the content of a `config.json` describes.

    Raises:
        ValueError: a field is missing, wrong, or asks for something that is not supported.
    """
    family = _family(config)
    fields = ConfigFields(config, family.defaults)
    _refuse_unsupported(fields, family)
    num_heads = fields.integer("num_attention_heads")
    has_groups = fields.get("num_key_value_heads") is not None and not family.is_latent
    has_width = fields.get("head_dim") is not None and not family.is_latent
    return Architecture(
        family=family.name,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_attention_heads=num_heads,
        num_query_groups=fields.integer("num_key_value_heads") if has_groups else num_heads,
        kv_channels=fields.integer("head_dim") if has_width else None,
        **family.attention(fields),
        **family.experts(fields),
        layernorm_epsilon=fields.number("rms_norm_eps"),
        **_rotary(fields, family),
        vocab_size=fields.integer("vocab_size"),
        max_sequence_length=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        bos_id=token_id(fields, "bos_token_id", CONFIG),
        eos_ids=token_ids(fields, "eos_token_id", CONFIG),
        dtype=_dtype(fields),
    )


def _family(config: Mapping[str, Any]) -> Family:
    """By `architectures`, or where that is missing by `model_type`."""
    field = "model_type" if config.get("architectures") is None else "architectures"
    names = config.get(field)
    names = names if isinstance(names, list) else [names]
    for family in FAMILIES.values():
        if not {family.name, family.class_name, *family.other_names}.isdisjoint(names):
            return family
    missing = next((UNSUPPORTED[name] for name in names if name in UNSUPPORTED), None)
    if missing is not None:
        raise ValueError(f"{field} = {config[field]} is not supported yet: it needs {missing}")
    supported = ", ".join(family.class_name for family in FAMILIES.values())
    raise ValueError(f"{field} = {config.get(field)} is not supported, only {supported} are")


def _rotary(fields: ConfigFields, family: Family) -> dict[str, Any]:
    rope = fields.get("rope_parameters", "rope_scaling") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters = {rope!r}: expected keys and values")
    base = rope.get("rope_theta") or fields.get("rope_theta") or family.rotary_base
    scaling = rotary_scaling(
        rope, fields.integer("max_position_embeddings"), family.has_partial_rotary
    )
    percent = _rotary_percent(fields, rope) if family.has_partial_rotary else 1.0
    return {"rotary_base": base, "rotary_percent": percent, "rotary_scaling": scaling}


def _rotary_percent(fields: ConfigFields, rope: dict[str, Any]) -> float:
    """Under its newer name, its older one, or as a number of channels."""
    for field in ("partial_rotary_factor", "rotary_dim"):
        value = rope.get(field, fields.get(field))
        if value is not None:
            return value / fields.integer("head_dim") if field == "rotary_dim" else value
    return 1.0


def _refuse_unsupported(fields: ConfigFields, family: Family) -> None:
    weight_block_size({"quantization_config": fields.get("quantization_config")})
    fields.refuse("hidden_act", "silu", "only 'silu' is")
    family.refuse_unsupported(fields)


def _dtype(fields: ConfigFields) -> str:
    name = fields.get("dtype", "torch_dtype") or "float32"
    plain = name.removeprefix("torch.") if isinstance(name, str) else name
    if plain not in DTYPES:
        raise ValueError(f"dtype = {name!r} is not supported, only {', '.join(DTYPES)} are")
    return plain
