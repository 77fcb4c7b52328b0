"""Megatron-Core's latent attention where TransformerEngine is not installed."""

from megatron.core.transformer import multi_latent_attention


def fit_latent_layers() -> None:
    """Let the layers be built: 0.16 takes a stand-in of TransformerEngine for itself, and asks
    whether a linear layer is one of its, which no object can be of a stand-in."""
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
