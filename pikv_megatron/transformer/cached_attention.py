"""What attention layers of every kind do to read and write a PiKV cache.

Legend: sq new tokens, b rows of the batch, t tokens of them that are real, np query heads, ng KV
heads, w_v width of a cached value, h hidden size.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.config import PiKVConfig
from pikv_megatron.transformer.context import PiKVInferenceContext

UNSUPPORTED = {
    "flash_decode": "Megatron's flash decoding",
    "fused_single_qkv_rope": "fused QKV rotation",
    "attention_output_gate": "gated attention output",
    "cache_mla_latents": "Megatron's own cache of latents",
}


class CachedAttention(ABC):
    """Mixed into a Megatron-Core attention, whose parameters stay the same.

    In training, without a context, or with any other context it is the stock layer.

    Args:
        pikv_config: the cache's configuration; checked against the layer's at construction.

    Raises:
        ValueError: the layer needs something that the cache does not support.
    """

    def __init__(self, config, *args, pikv_config: PiKVConfig, **kwargs):
        _refuse_unsupported(config, pikv_config)
        super().__init__(config, *args, **kwargs)
        self.pikv_config = pikv_config

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
        layer = context.layers[self.layer_number]
        if layer.expert_source is not None:
            experts = self.expert_shares(hidden_states, context, layer)
            layer.weigh_shards(by_row(experts.view(sq, b, -1), plan.num_tokens))
        output = self._attend(hidden_states, rotary_pos_emb, context, plan, layer).flatten(1)
        if plan.num_tokens < sq * b:
            output = F.pad(output, (0, 0, 0, sq * b - plan.num_tokens))
        output = output.unsqueeze(1) if b == 1 else output.view(b, sq, -1).transpose(0, 1)
        return self.linear_proj(output)

    @abstractmethod
    def _attend(
        self, hidden_states: torch.Tensor, rotary_pos_emb, context: PiKVInferenceContext,
        plan: StepPlan, layer: LayerCache,
    ) -> torch.Tensor:
        """Attention of a step's tokens: [sq, b, h] -> [t, np, width]."""

    @abstractmethod
    def value_outputs(self) -> torch.Tensor:
        """[ng, np / ng, w_v, h]: what the layer makes of a cached value in each head."""


def by_row(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[sq, b, ...] -> [t, ...], the tokens of a row side by side; b is 1 but under Megatron's
    engine."""
    flat = x.squeeze(1) if x.shape[1] == 1 else x.transpose(0, 1).flatten(0, 1)
    return flat if len(flat) == num_tokens else flat[:num_tokens]


def _refuse_unsupported(config, pikv_config: PiKVConfig) -> None:
    for field, meaning in UNSUPPORTED.items():
        value = getattr(config, field, None)
        if value:
            raise ValueError(f"{field}={value}: {meaning} is not supported under PiKV yet")
    if config.context_parallel_size > 1:
        raise ValueError("context_parallel_size: the PiKV cache shards KV itself; set it to 1")
    topk, replicas = config.moe_router_topk, pikv_config.replicas
    if config.num_moe_experts and replicas > topk:
        raise ValueError(f"replicas {replicas} must not exceed moe_router_topk {topk}")
