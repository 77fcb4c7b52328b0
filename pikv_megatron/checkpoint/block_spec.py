"""The stock layers of an architecture, from the best modules that this machine has."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.group_router import group_router
from pikv_megatron.checkpoint.latent_sizes import LatentSizes
from pikv_megatron.checkpoint.projection_norm import (
    KeyProjectionNorm,
    QueryProjectionNorm,
    clip_values,
)
from pikv_megatron.runtime.latent_layers import fit_latent_layers
from pikv_megatron.runtime.norms import FittingNorm, fit_layer_norms
from pikv_megatron.transformer.latent_attention import LatentDotProductAttention


def layer_spec(architecture: Architecture) -> TransformerBlockSubmodules:
    """The stock block spec: TransformerEngine's modules where it and CUDA are, else local ones."""
    layers = [_one_layer_spec(architecture, is_moe) for is_moe in architecture.is_moe_layer]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm())


def _one_layer_spec(architecture: Architecture, is_moe: bool) -> ModuleSpec:
    is_latent = architecture.latent_attention is not None
    arguments = dict(
        num_experts=architecture.num_experts if is_moe else None,
        qk_layernorm=architecture.qk_layernorm != "none" or is_latent,
        multi_latent_attention=is_latent,
    )
    local = get_gpt_layer_local_spec(**arguments, normalization=architecture.normalization)
    fit_layer_norms(local)
    spec = local
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(**arguments)
    if is_latent:
        spec.submodules.self_attention = local.submodules.self_attention
        _fit_latent_attention(local.submodules.self_attention, architecture.latent_attention)
    if architecture.qk_layernorm == "projection":
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm, attention.k_layernorm = QueryProjectionNorm, KeyProjectionNorm
        if architecture.clip_qkv is not None:
            attention.linear_qkv = clip_values(attention.linear_qkv)
    if is_moe and _judges_its_own_way(architecture):
        router = group_router(architecture.moe_router_group_judges)
        spec.submodules.mlp.submodules.router = router
    if architecture.attention_output_bias:
        attention = spec.submodules.self_attention.submodules
        attention.linear_proj = with_bias(attention.linear_proj)
    return spec


def _judges_its_own_way(architecture: Architecture) -> bool:
    """Whether Megatron-Core would choose groups of experts otherwise."""
    judges = architecture.moe_router_group_judges
    if judges is None:
        return False
    return judges != architecture.moe_router_topk // architecture.moe_router_group_topk


def _fit_latent_attention(attention: ModuleSpec, sizes: LatentSizes) -> None:
    """Norms with an epsilon of their own, which TransformerEngine's fused ones have not."""
    fit_latent_layers()
    submodules = attention.submodules
    submodules.core_attention = LatentDotProductAttention
    submodules.q_layernorm = submodules.kv_layernorm = with_epsilon(sizes.norm_epsilon)


def with_epsilon(epsilon: float) -> type:
    """A norm whose epsilon is not that of the layers' norms."""

    class NormWithEpsilon(FittingNorm):
        def __new__(cls, config, hidden_size, eps=None, **kwargs):
            return FittingNorm(config, hidden_size, eps=epsilon, **kwargs)

    return NormWithEpsilon


def with_bias(linear: type) -> type:
    """A linear layer that has a bias, where Megatron-Core gives all of them one or none."""

    class BiasedLinear(linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"bias": True})

    return BiasedLinear


def _final_norm() -> type:
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return FittingNorm


def has_transformer_engine() -> bool:
    """Whether TransformerEngine's modules can be used: they are installed, and there is CUDA."""
    from megatron.core.models.gpt import gpt_layer_specs

    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE
