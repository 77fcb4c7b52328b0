"""The shapes of a Megatron model's attention layers on this rank."""

import math

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from pikv_megatron.cache.head_maps import sent_widths
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.types import KVShape


def layer_shapes(model: GPTModel) -> list[LayerShape]:
    """Of every layer, in order; widths and heads are those of this tensor-parallel rank."""
    return [_shape(layer.self_attention) for layer in model.decoder.layers]


def _shape(attention: SelfAttention | MLASelfAttention) -> LayerShape:
    weight = next(attention.parameters())
    if isinstance(attention, MLASelfAttention):
        return _latent_shape(attention, weight)
    width = attention.hidden_size_per_attention_head
    kv = KVShape(
        attention.num_query_groups_per_partition, width, width, weight.dtype, weight.device
    )
    return LayerShape(
        kv, attention.num_attention_heads_per_partition, softmax_scale(attention),
        sliding_window(attention.config, attention.layer_number),
    )


def _latent_shape(attention: MLASelfAttention, weight: torch.Tensor) -> LayerShape:
    """One row for all heads, whose first columns are the values."""
    config = attention.config
    rank, width = config.kv_lora_rank, config.kv_lora_rank + config.qk_pos_emb_head_dim
    kv = KVShape(1, width, rank, weight.dtype, weight.device, values_in_keys=True)
    sent = sent_widths(
        config.qk_head_dim, config.qk_pos_emb_head_dim, rank, config.v_head_dim
    )
    return LayerShape(
        kv, attention.num_attention_heads_per_partition, attention.softmax_scale, sent_widths=sent
    )


def sliding_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a query of a layer sees, its own included; None: all of them.

    Megatron-Core counts those beside it: its (127, 0) is a window of 128.

    Raises:
        ValueError: the window reaches beyond the query, or has no left end.
    """
    window = getattr(config, "window_size", None)
    skip_freq = getattr(config, "window_attn_skip_freq", None)
    if not is_layer_window_attention(window, skip_freq, layer_number):
        return None
    if window[0] < 0 or window[1] != 0:
        raise ValueError(
            f"window_size={tuple(window)}: the PiKV cache needs a causal window, (tokens, 0)"
        )
    return window[0] + 1


def softmax_scale(attention: SelfAttention) -> float:
    """The factor on a layer's logits."""
    scale = attention.config.softmax_scale
    return 1.0 / math.sqrt(attention.hidden_size_per_attention_head) if scale is None else scale
