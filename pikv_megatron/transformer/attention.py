"""Megatron self-attention that reads and writes a PiKV cache.

Legend: sq new tokens, b rows of the batch, t tokens of them that are real, np query heads, ng KV
heads, hn head width, h hidden size.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from pikv_megatron.config import PiKVConfig
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.layer_shapes import sliding_window

try:
    from megatron.core.transformer.attention import _yarn_get_concentration_factor_from_config
except ImportError:  # moved between releases
    from megatron.core.models.common.embeddings import (
        _yarn_get_concentration_factor_from_config,
    )


class PiKVSelfAttention(SelfAttention):
    """`SelfAttention` with the same parameters, whose cache is a `PiKVInferenceContext`.

    In training, without a context, or with any other context it is the stock layer.

    Args:
        pikv_config: the cache's configuration; checked against the layer's at construction.

    Raises:
        ValueError: the layer needs something that the cache does not support.
    """

    def __init__(self, config, *args, pikv_config: PiKVConfig, **kwargs):
        _refuse_unsupported(config, pikv_config)
        super().__init__(config, *args, **kwargs)
        sliding_window(config, self.layer_number)
        self.pikv_config = pikv_config
        norms = self.q_layernorm, self.k_layernorm
        self._is_plain = (
            all(isinstance(norm, (IdentityOp, type(None))) for norm in norms)
            and self.world_size == 1
        )

    def forward(
        self, hidden_states, attention_mask, key_value_states=None, inference_context=None,
        rotary_pos_emb=None, *args, inference_params=None, **kwargs,
    ):
        context = inference_context if inference_context is not None else inference_params
        if self.training or not isinstance(context, PiKVInferenceContext):
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb,
                *args, inference_params=inference_params, **kwargs,
            )
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError("packed_seq_params: packed sequences are not supported under PiKV")
        return self._forward_cached(hidden_states, context, rotary_pos_emb)

    def _forward_cached(self, hidden_states, context, rotary_pos_emb):
        plan = context.step(self.layer_number, hidden_states)
        sq, b = hidden_states.shape[:2]
        query, key, value = self._project(hidden_states, rotary_pos_emb, plan)
        # Of the softmax's own logits it has one a head, learned, that is no token's.
        sink = getattr(self.core_attention, "softmax_offset", None)
        layer = context.layers[self.layer_number]
        output = layer.attend(query, key, value, plan, sink).flatten(1)
        if plan.num_tokens < sq * b:
            output = F.pad(output, (0, 0, 0, sq * b - plan.num_tokens))
        output = output.unsqueeze(1) if b == 1 else output.view(b, sq, -1).transpose(0, 1)
        return self.linear_proj(output)

    def _project(self, hidden_states, rotary_pos_emb, plan):
        """Query [t, np, hn], key and value [t, ng, hn] of the step's tokens, rotated."""
        rotation = self._rotation(rotary_pos_emb, plan, hidden_states.dtype)
        hn, ng = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        if self._is_plain:
            # A KV head's queries come first, then its key and its value.
            mixed = _by_row(self.linear_qkv(hidden_states)[0], plan.num_tokens)
            heads = mixed.unflatten(1, (ng, -1, hn))
            value = heads[:, :, -1]
            heads = heads[:, :, :-1]
        else:
            states = self.get_query_key_value_tensors(hidden_states)[:3]
            query, key, value = (_by_row(x, plan.num_tokens) for x in states)
            heads = torch.cat([query.unflatten(1, (ng, -1)), key.unsqueeze(2)], dim=2)
        if rotation is not None:
            heads = rotation.apply(heads)
        return heads[:, :, :-1].flatten(1, 2), heads[:, :, -1], value

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


def _by_row(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[sq, b, ...] -> [t, ...], the tokens of a row side by side; b is 1 but under Megatron's
    engine."""
    flat = x.squeeze(1) if x.shape[1] == 1 else x.transpose(0, 1).flatten(0, 1)
    return flat if len(flat) == num_tokens else flat[:num_tokens]


def _refuse_unsupported(config, pikv_config: PiKVConfig) -> None:
    unsupported = {
        "multi_latent_attention": "latent attention (MLA)",
        "flash_decode": "Megatron's flash decoding",
        "fused_single_qkv_rope": "fused QKV rotation",
        "attention_output_gate": "gated attention output",
    }
    for field, meaning in unsupported.items():
        value = getattr(config, field, None)
        if value:
            raise ValueError(f"{field}={value}: {meaning} is not supported under PiKV yet")
    if config.context_parallel_size > 1:
        raise ValueError("context_parallel_size: the PiKV cache shards KV itself; set it to 1")
    topk, replicas = config.moe_router_topk, pikv_config.replicas
    if config.num_moe_experts and replicas > topk:
        raise ValueError(f"replicas {replicas} must not exceed moe_router_topk {topk}")
