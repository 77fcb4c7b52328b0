"""Megatron self-attention that reads and writes a PiKV cache.

Legend: sq new tokens, b rows of the batch, t tokens of them that are real, np query heads, ng KV
heads, hn head width, h hidden size.
"""

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.transformer.cached_attention import CachedAttention, by_row
from pikv_megatron.transformer.layer_prompt import LayerPrompt
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
        norms = self.q_layernorm, self.k_layernorm
        self._is_plain = (
            all(isinstance(norm, (IdentityOp, type(None))) for norm in norms)
            and self.world_size == 1
        )

    def _attend(self, hidden_states, rotary_pos_emb, context, plan, layer):
        query, key, value = self._project(hidden_states, rotary_pos_emb, plan)
        angles = layer.store.angles if isinstance(layer, LayerCache) else None
        if angles is not None and not angles.is_known:
            angles.learn(self._frequencies(rotary_pos_emb))
        # Of the softmax's own logits it has one a head, learned, that is no token's.
        sink = getattr(self.core_attention, "softmax_offset", None)
        output = layer.attend(query, key, value, plan, sink)
        if layer.scores_prompts:
            table = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
            hidden = by_row(hidden_states, plan.num_tokens)
            layer.score(self._prompts(hidden, key, value, plan, table), plan)
        return output

    def _prompts(self, hidden, key, value, plan, table) -> list[LayerPrompt]:
        """The step's prompts, of hidden states [t, h] and what was made of them."""
        first, prompts = plan.decode.num_rows, []
        for row in plan.prefill.rows:
            tokens = slice(first + row.tokens.start, first + row.tokens.stop)
            parts = (x[tokens] for x in (hidden, key, value))
            prompts.append(LayerPrompt(self, *parts, row.past, table))
        return prompts

    def value_outputs(self):
        groups = self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head
        return self.linear_proj.weight.T.unflatten(0, groups)

    def _project(self, hidden_states, rotary_pos_emb, plan):
        """Query [t, np, hn], key and value [t, ng, hn] of the step's tokens, rotated."""
        rotation = self._rotation(rotary_pos_emb, plan, hidden_states.dtype)
        hn, ng = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        if self._is_plain:
            # A KV head's queries come first, then its key and its value.
            mixed = by_row(self.linear_qkv(hidden_states)[0], plan.num_tokens)
            heads = mixed.unflatten(1, (ng, -1, hn))
            value = heads[:, :, -1]
            heads = heads[:, :, :-1]
        else:
            states = self.get_query_key_value_tensors(hidden_states)[:3]
            query, key, value = (by_row(x, plan.num_tokens) for x in states)
            heads = torch.cat([query.unflatten(1, (ng, -1)), key.unsqueeze(2)], dim=2)
        if rotation is not None:
            heads = rotation.apply(heads)
        return heads[:, :, :-1].flatten(1, 2), heads[:, :, -1], value

    def _frequencies(self, rotary_pos_emb) -> torch.Tensor:
        """[w / 2]: angles of position 1.

        Raises:
            ValueError: the layer does not rotate keys, or pairs neighbouring channels.
        """
        config = self.config
        table = rotary_pos_emb[1] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        no_rope = config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]
        if table is None or no_rope or config.rotary_interleaved:
            raise ValueError(
                f"codec.keys before_rope: layer {self.layer_number - 1} "
                + ("pairs neighbouring channels" if config.rotary_interleaved else "has no RoPE")
                + "; leave it out for this layer"
            )
        return table[1, 0, 0, : table.shape[-1] // 2].float()

    def _rotation(self, rotary_pos_emb, plan, dtype):
        """RoPE (arXiv 2104.09864) at each row's own positions, None without; keys are stored
        rotated."""
        no_rope = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        if rotary_pos_emb is None or no_rope:
            return None
        if isinstance(rotary_pos_emb, tuple):
            query_table, key_table = rotary_pos_emb
            if query_table is not key_table:
                raise ValueError(
                    "rotary_pos_emb: different angles for queries and keys are not supported "
                    "under PiKV"
                )
            rotary_pos_emb = query_table
            if rotary_pos_emb is None:
                return None
        mscale = _yarn_get_concentration_factor_from_config(self.config)
        return plan.rotary(rotary_pos_emb, mscale, self.config.rotary_interleaved, dtype)
