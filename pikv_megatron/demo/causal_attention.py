"""Core attention for training on a CPU: torch's fused kernel keeps no square of scores."""

import copy

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CausalAttention(MegatronModule):
    """Megatron-Core's core attention for whole causal sequences; masks are ignored."""

    def __init__(self, config: TransformerConfig, **unused):
        super().__init__(config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *masks, **unused) -> Tensor:
        """Attend.

        Args:
            query: `[s, b, np, hn]`.
            key: `[s, b, ng, hn]`.
            value: `[s, b, ng, hn]`.

        Returns:
            `[s, b, np * hn]`.
        """
        num_repeats = query.shape[2] // key.shape[2]
        key, value = (t.repeat_interleave(num_repeats, dim=2) for t in (key, value))
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def with_causal_attention(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The block spec with `CausalAttention` in every layer; parameters stay the same."""
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec
