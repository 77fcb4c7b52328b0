"""The honest reference: the same model over a preallocated dense cache that is written in place.

Legend: b sequences, np query heads, ng KV heads, hn head width, t tokens in the cache.
"""

import copy
import math
from typing import Callable

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_megatron.transformer.attention import _yarn_get_concentration_factor_from_config
from pikv_megatron.transformer.lean_layer import LeanLayerMixin
from pikv_megatron.transformer.lean_moe import make_lean
from pikv_megatron.transformer.plain_linears import PLAIN

DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def grouped_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Heads that share keys are the rows of one matrix product.

    Args:
        query: [b, np, hn].
        keys: [b, ng, t, hn].
        values: [b, ng, t, hn].
        softmax_scale: factor on the logits.

    Returns:
        [b, np, hn].
    """
    rows = (query * softmax_scale).view(query.shape[0], keys.shape[1], -1, query.shape[2])
    logits = torch.matmul(rows, keys.transpose(2, 3)).float()
    weights = torch.softmax(logits, dim=-1).to(values.dtype)
    return torch.matmul(weights, values).view_as(query)


def sdpa_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """torch's own attention; arguments as of `grouped_attention`."""
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2), keys, values, scale=softmax_scale, enable_gqa=True
    )
    return out.squeeze(2)


class DenseContext(StaticInferenceContext):
    """Keys after RoPE and values of every layer, [b, ng, capacity, hn]. Decoding only.

    Args:
        max_batch_size: b.
        max_sequence_length: capacity, tokens.
        attention: `grouped_attention` or `sdpa_attention`.
        decode_counts: tokens that each rank feeds in a step.
        ep_group: the expert-parallel group; None for a single rank.
    """

    def __init__(
        self, max_batch_size: int, max_sequence_length: int, attention: DenseAttention,
        decode_counts: list[int], ep_group,
    ):
        super().__init__(max_batch_size, max_sequence_length)
        self.decode_counts = decode_counts
        self.ep_group = ep_group
        self._attention = attention

    def attend(
        self, layer_number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        softmax_scale: float,
    ) -> torch.Tensor:
        """Cache the new token and attend to all: query [1, b, np, hn] -> [1, b, np * hn]."""
        keys, values = self.key_value_memory_dict[layer_number]
        last = self.sequence_len_offset
        keys[:, :, last], values[:, :, last] = key[0], value[0]
        cached = (t[:, :, : last + 1] for t in (keys, values))
        return self._attention(query[0], *cached, softmax_scale).flatten(1).unsqueeze(0)


class DenseSelfAttention(SelfAttention):
    """`SelfAttention` with the same parameters over a `DenseContext`."""

    def forward(
        self, hidden_states, attention_mask, key_value_states=None, inference_context=None,
        rotary_pos_emb=None, *args, **kwargs,
    ):
        if not isinstance(inference_context, DenseContext):
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context,
                rotary_pos_emb, *args, **kwargs,
            )
        query, key, value = self.get_query_key_value_tensors(hidden_states)[:3]
        last = inference_context.sequence_len_offset
        table = rotary_pos_emb[last : last + 1]
        query, key = (rotate(t, table, self.config, self.pg_collection.cp) for t in (query, key))
        scale = self.config.softmax_scale or 1.0 / math.sqrt(self.hidden_size_per_attention_head)
        output = inference_context.attend(self.layer_number, query, key, value, scale)
        return self.linear_proj(output)


def rotate(tensor: torch.Tensor, table: torch.Tensor, config, cp_group) -> torch.Tensor:
    """RoPE of [t, b, heads, hn] by the rows [t, 1, 1, hn] of the model's table."""
    mscale = _yarn_get_concentration_factor_from_config(config)
    return apply_rotary_pos_emb(tensor, table, config=config, mscale=mscale, cp_group=cp_group)


class DenseLayerMixin(LeanLayerMixin):
    """A transformer layer with the lean step of one under PiKV: what is compared is the cache."""

    lean_context = DenseContext

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_lean(self.mlp)


def dense_layer_spec(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Put dense attention into a block spec; the given spec is left alone."""
    spec = copy.deepcopy(spec)
    for layer in spec.layer_specs:
        layer.module = type("DenseTransformerLayer", (DenseLayerMixin, layer.module), {})
        attention = layer.submodules.self_attention
        attention.module = DenseSelfAttention
        for name in ("linear_qkv", "linear_proj"):
            linear = getattr(attention.submodules, name)
            setattr(attention.submodules, name, PLAIN.get(linear, linear))
    return spec
