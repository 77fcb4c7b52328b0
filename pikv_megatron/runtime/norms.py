"""Apex's LayerNorm where it is NVIDIA's and fits the model, torch's norms everywhere else.

Without TransformerEngine, Megatron-Core puts Apex's `FusedLayerNorm` into a spec as soon as any
package named `apex` can be imported. It refuses RMSNorm, and fails if the package is not NVIDIA's.
"""

import torch
from megatron.core.fusions import fused_layer_norm
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class FittingNorm:
    """Builds the norm that `config.normalization` asks for."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        has_nvidia_apex = torch.cuda.is_available() and fused_layer_norm.HAVE_FUSED_LAYER_NORM
        fits = has_nvidia_apex and config.normalization == "LayerNorm"
        norm = FusedLayerNorm if fits else WrappedTorchNorm
        return norm(config=config, hidden_size=hidden_size, eps=eps, **kwargs)


def fit_layer_norms(layer: ModuleSpec) -> None:
    """Put `FittingNorm` in the place of Apex's in a layer spec."""
    for submodules in (layer.submodules, layer.submodules.self_attention.submodules):
        for name, module in vars(submodules).items():
            if module is FusedLayerNorm:
                setattr(submodules, name, FittingNorm)


def fit_final_norm() -> None:
    """The same for the norm behind the last layer, which a layer spec alone leaves to Megatron."""
    if transformer_block.LayerNormImpl is FusedLayerNorm:
        transformer_block.LayerNormImpl = FittingNorm
