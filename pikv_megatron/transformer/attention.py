"""Megatron self-attention that reads and writes a PiKV cache.

Legend: sq new tokens, b rows of the batch, t tokens of them that are real, np query heads, ng KV
heads, hn head width, h hidden size.
"""

import torch
from megatron.core.transformer.attention import SelfAttention

from pikv_megatron.transformer.cached_attention import CachedAttention, by_row
from pikv_megatron.transformer.layer_shapes import sliding_window

try:
    from megatron.core.transformer.attention import _yarn_get_concentration_factor_from_config
except ImportError:  # moved between releases
    from megatron.core.models.common.embeddings import (
        _yarn_get_concentration_factor_from_config,
    )


class PiKVSelfAttention(CachedAttention, SelfAttention):
    """`SelfAttention` with the same parameters, whose cache is a `PiKVInferenceContext`."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        sliding_window(config, self.layer_number)

    def _attend(self, hidden_states, rotary_pos_emb, context, plan, layer):
        states = self.get_query_key_value_tensors(hidden_states)[:3]
        query, key, value = (by_row(x, plan.num_tokens) for x in states)
        query, key = self._rotate(query, key, rotary_pos_emb, plan)
        # Of the softmax's own logits it has one a head, learned, that is no token's.
        sink = getattr(self.core_attention, "softmax_offset", None)
        return layer.attend(query, key, value, plan, sink)

    def _rotate(self, query, key, rotary_pos_emb, plan):
        """RoPE (arXiv 2104.09864) at each row's own positions; keys are stored rotated."""
        no_rope = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        if rotary_pos_emb is None or no_rope:
            return query, key
        if isinstance(rotary_pos_emb, tuple):
            query_table, key_table = rotary_pos_emb
            if query_table is not key_table:
                raise ValueError(
                    "rotary_pos_emb: different angles for queries and keys are not supported "
                    "under PiKV"
                )
            rotary_pos_emb = query_table
            if rotary_pos_emb is None:
                return query, key
        mscale = _yarn_get_concentration_factor_from_config(self.config)
        rotation = plan.rotary(rotary_pos_emb, mscale, self.config.rotary_interleaved, query.dtype)
        heads = rotation.apply(torch.cat([query, key], dim=1))
        return heads.split([query.shape[1], key.shape[1]], dim=1)
