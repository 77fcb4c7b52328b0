"""Rotary embeddings beyond the plain ones: the variants that Megatron-Core expresses exactly."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LLAMA3_CONSTANTS = {  # Megatron-Core takes only the factor as an argument
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class RotaryScaling(BaseModel):
    """How rotary frequencies are stretched for contexts beyond the trained length.

    Attributes:
        kind: `linear` (positions divided by the factor), `llama3` or `yarn`.
        factor: by how much the context grows.
        original_max_positions: trained context length, in tokens (yarn only).
        beta_fast, beta_slow: rotations between which yarn blends old and stretched frequencies.
        mscale, mscale_all_dim: yarn's attention factor as a ratio; both or neither.
        attention_factor: yarn's attention factor itself, where a checkpoint has its own.
        round_correction_range: whether yarn rounds the blended range to whole dimensions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = Field(default=None, gt=0)
    round_correction_range: bool = True

    def mscales(self) -> tuple[float | None, float | None]:
        """Both scales as Megatron-Core takes them; its factor is the ratio of 0.1 m ln(factor) + 1.

        Raises:
            ValueError: a factor of the checkpoint's own, which that cannot be where nothing grows.
        """
        if self.attention_factor is None:
            return self.mscale, self.mscale_all_dim
        if self.factor > 1:
            return (self.attention_factor - 1.0) / (0.1 * math.log(self.factor)), 0.0
        if self.attention_factor != 1.0:
            _refuse("attention_factor", self.attention_factor, "1, as factor is at most 1")
        return None, None


def rotary_scaling(
    parameters: dict[str, Any], max_positions: int, is_partial: bool = False
) -> RotaryScaling | None:
    """Read `rope_parameters` (or the older `rope_scaling`) of a Hugging Face config.

    Args:
        parameters: the field's content.
        max_positions: longest context, in tokens.
        is_partial: whether a part of each head may be rotated.

    Raises:
        ValueError: the variant, or a setting of it, has no exact counterpart in Megatron-Core.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not is_partial and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("partial_rotary_factor", parameters["partial_rotary_factor"], "1.0")
    if kind == "default":
        return None
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind not in readers:
        _refuse("rope_type", kind, "one of default, linear, llama3, yarn")
    return readers[kind](parameters, max_positions)


def _linear(parameters: dict[str, Any], max_positions: int) -> RotaryScaling:
    return RotaryScaling(kind="linear", factor=_required(parameters, "factor"))


def _llama3(parameters: dict[str, Any], max_positions: int) -> RotaryScaling:
    for field, constant in LLAMA3_CONSTANTS.items():
        if _required(parameters, field) != constant:
            _refuse(field, parameters[field], f"{constant}, which Megatron-Core fixes for llama3")
    return RotaryScaling(kind="llama3", factor=_required(parameters, "factor"))


def _yarn(parameters: dict[str, Any], max_positions: int) -> RotaryScaling:
    original = parameters.get("original_max_position_embeddings") or max_positions
    mscales = parameters.get("mscale"), parameters.get("mscale_all_dim")
    mscale, mscale_all_dim = mscales if all(mscales) else (None, None)
    return RotaryScaling(
        kind="yarn",
        factor=parameters.get("factor") or max_positions / original,
        original_max_positions=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor=parameters.get("attention_factor"),
        round_correction_range=parameters.get("truncate", True),
    )


def _required(parameters: dict[str, Any], field: str) -> Any:
    if parameters.get(field) is None:
        raise ValueError(f"rope_parameters lacks {field}, which its rope_type needs")
    return parameters[field]


def _refuse(field: str, value: Any, remedy: str) -> None:
    raise ValueError(f"rope_parameters.{field} = {value!r} is not supported: it must be {remedy}")
