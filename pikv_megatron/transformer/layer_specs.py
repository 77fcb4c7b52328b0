"""The swap: a Megatron layer spec in, the same spec with PiKV attention out."""

import copy

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_megatron.config import PiKVConfig
from pikv_megatron.runtime.cpu_fallback import apply_cpu_fallback
from pikv_megatron.runtime.latent_layers import fit_latent_layers
from pikv_megatron.runtime.norms import (
    FittingNorm,
    FusedLayerNorm,
    fit_final_norm,
    fit_layer_norms,
)
from pikv_megatron.transformer.attention import PiKVSelfAttention
from pikv_megatron.transformer.latent_attention import (
    LatentDotProductAttention,
    PiKVLatentAttention,
)
from pikv_megatron.transformer.plain_linears import PLAIN
from pikv_megatron.transformer.transformer_layer import pikv_layer_class

CACHED = {SelfAttention: PiKVSelfAttention, MLASelfAttention: PiKVLatentAttention}


def pikv_layer_spec(
    spec: ModuleSpec | TransformerBlockSubmodules, pikv_config: PiKVConfig
) -> ModuleSpec | TransformerBlockSubmodules:
    """Put PiKV attention into a GPT layer spec or block spec; the given spec is left alone.

    Parameters, state-dict keys and sharded keys stay those of the stock layer, so every
    checkpoint loads unchanged. Apex's norms give way to torch's where they would not work.

    Raises:
        ValueError: a layer has cross or otherwise unknown attention.
    """
    apply_cpu_fallback()
    spec = copy.deepcopy(spec)
    if isinstance(spec, TransformerBlockSubmodules):
        spec.layer_specs = [_swap(layer, pikv_config) for layer in spec.layer_specs]
        if spec.layer_norm is FusedLayerNorm:
            spec.layer_norm = FittingNorm
        return spec
    fit_final_norm()
    return _swap(spec, pikv_config)


def _swap(layer: ModuleSpec, pikv_config: PiKVConfig) -> ModuleSpec:
    submodules = getattr(layer, "submodules", None)
    attention = getattr(submodules, "self_attention", None)
    if not isinstance(attention, ModuleSpec) or not isinstance(attention.module, type):
        raise ValueError(f"spec: expected a transformer layer or block spec, got {layer}")
    kind = next((base for base in CACHED if issubclass(attention.module, base)), None)
    if kind is None:
        raise ValueError(
            f"self_attention: {attention.module.__name__} is not supported under PiKV yet; "
            "SelfAttention and MLASelfAttention are"
        )
    if getattr(submodules, "cross_attention", IdentityOp) is not IdentityOp:
        raise ValueError("cross_attention is not supported under PiKV")
    attention.module = CACHED[kind]
    # Megatron-Core looks at the classes of the down-projections of latent attention.
    for name in ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_proj"):
        linear = getattr(attention.submodules, name, None)
        if linear in PLAIN:
            setattr(attention.submodules, name, PLAIN[linear])
    if kind is MLASelfAttention:
        fit_latent_layers()
        if attention.submodules.core_attention is DotProductAttention:
            attention.submodules.core_attention = LatentDotProductAttention
    attention.params = {**(attention.params or {}), "pikv_config": pikv_config}
    layer.module = pikv_layer_class(layer.module)
    fit_layer_norms(layer)
    return layer
