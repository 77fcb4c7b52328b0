"""The shapes of a Megatron model's attention layers on this rank."""

import math

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention

from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.types import KVShape


def layer_shapes(model: GPTModel) -> list[LayerShape]:
    """Of every layer, in order; widths and heads are those of this tensor-parallel rank."""
    return [_shape(layer.self_attention) for layer in model.decoder.layers]


def _shape(attention: SelfAttention) -> LayerShape:
    weight = next(attention.parameters())
    width = attention.hidden_size_per_attention_head
    kv = KVShape(
        attention.num_query_groups_per_partition, width, width, weight.dtype, weight.device
    )
    return LayerShape(kv, attention.num_attention_heads_per_partition, softmax_scale(attention))


def softmax_scale(attention: SelfAttention) -> float:
    """The factor on a layer's logits."""
    scale = attention.config.softmax_scale
    return 1.0 / math.sqrt(attention.hidden_size_per_attention_head) if scale is None else scale
