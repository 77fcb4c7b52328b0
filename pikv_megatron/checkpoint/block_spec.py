"""The stock layers of an architecture, from the best modules that this machine has."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.projection_norm import (
    KeyProjectionNorm,
    QueryProjectionNorm,
    clip_values,
)


def layer_spec(architecture: Architecture) -> TransformerBlockSubmodules:
    """The stock block spec: TransformerEngine's modules where it and CUDA are, else local ones."""
    layers = [_one_layer_spec(architecture, is_moe) for is_moe in architecture.is_moe_layer]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(architecture))


def _one_layer_spec(architecture: Architecture, is_moe: bool) -> ModuleSpec:
    arguments = dict(
        num_experts=architecture.num_experts if is_moe else None,
        qk_layernorm=architecture.qk_layernorm != "none",
    )
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(**arguments)
    else:
        # By this name Megatron-Core picks torch's norms, which read the real one from the config;
        # by any other, Apex's, wherever some package of that name can be imported.
        torch_norm = _norm(architecture) is WrappedTorchNorm
        arguments["normalization"] = "RMSNorm" if torch_norm else "LayerNorm"
        spec = get_gpt_layer_local_spec(**arguments)
    if architecture.qk_layernorm == "projection":
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm, attention.k_layernorm = QueryProjectionNorm, KeyProjectionNorm
        if architecture.clip_qkv is not None:
            attention.linear_qkv = clip_values(attention.linear_qkv)
    return spec


def _norm(architecture: Architecture) -> type:
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if architecture.normalization == "LayerNorm" and _has_nvidia_apex():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return WrappedTorchNorm


def has_transformer_engine() -> bool:
    """Whether TransformerEngine's modules can be used: they are installed, and there is CUDA."""
    from megatron.core.models.gpt import gpt_layer_specs

    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE


def _has_nvidia_apex() -> bool:
    from megatron.core.fusions import fused_layer_norm

    return torch.cuda.is_available() and fused_layer_norm.HAVE_FUSED_LAYER_NORM
