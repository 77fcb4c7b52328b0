"""Megatron's latent attention (MLA, arXiv 2405.04434) that reads and writes a PiKV cache.

A token's row in the cache is its latent, normalised, and a key that RoPE turned, the same for all
heads.

Legend: sq new tokens, b rows of the batch, t tokens of them that are real, np query heads of this
rank, w_n and w_r widths of the parts of a head's query that RoPE leaves and turns, w_v width of its
value, r rank of the latent.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from pikv_megatron.cache.head_maps import LatentMaps
from pikv_megatron.transformer.cached_attention import CachedAttention, by_row


class PiKVLatentAttention(CachedAttention, MLASelfAttention):
    """`MLASelfAttention` with the same parameters, whose cache is a `PiKVInferenceContext`."""

    def _attend(self, hidden_states, rotary_pos_emb, context, plan, layer):
        config = self.config
        query = by_row(self._query(hidden_states), plan.num_tokens)
        row = by_row(self._row(hidden_states), plan.num_tokens)
        own, turned = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        latent, key = row.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        turned = torch.cat([turned, key], dim=1).unsqueeze(1)
        turned = self._rotation(context, plan, query.dtype).apply(turned).squeeze(1)
        query = torch.cat([own, turned[:, :-1]], dim=-1)
        row = torch.cat([latent, turned[:, -1:]], dim=-1)
        return layer.attend(query, row, None, plan, maps=LatentMaps(*self._projections()))

    def value_outputs(self):
        _, value_up = self._projections()
        outputs = self.linear_proj.weight.T.unflatten(0, (-1, self.config.v_head_dim))
        return torch.matmul(value_up, outputs).unsqueeze(0)

    def _query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[sq, b, np, w_n + w_r]."""
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            low = _whole(self.linear_q_down_proj(hidden_states)[0], self.config.q_lora_rank)
            query, _ = self.linear_q_up_proj(self.q_layernorm(low))
        return query.unflatten(-1, (-1, self.q_head_dim))

    def _row(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[sq, b, 1, r + w_r], the key not turned yet."""
        rank, width = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        row = _whole(self.linear_kv_down_proj(hidden_states)[0], rank + width)
        latent, key = row.split([rank, width], dim=-1)
        latent = self.kv_layernorm(latent)
        # TransformerEngine fuses the norm into the projection behind it, which is absorbed here.
        weight = getattr(self.linear_kv_up_proj, "layer_norm_weight", None)
        if weight is not None:
            latent = F.rms_norm(latent, (rank,), weight, self.config.layernorm_epsilon)
        return torch.cat([latent, key], dim=-1).unsqueeze(2)

    def _projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of latents, views of one weight: to keys [np, w_n, r], to values [np, r, w_v]."""
        config = self.config
        heads = self.linear_kv_up_proj.weight.unflatten(
            0, (-1, config.qk_head_dim + config.v_head_dim)
        )
        key_up, value_up = heads.split([config.qk_head_dim, config.v_head_dim], dim=1)
        return key_up, value_up.transpose(1, 2)

    def _rotation(self, context, plan, dtype):
        """Pairs are of neighbours, as released weights have them: products of queries and keys are
        those of Megatron-Core, which brings the pairs' parts together first."""
        table, mscale = context.rotary_table(self._angles)
        return plan.rotary(table, mscale, True, dtype)

    def _angles(self, num_positions: int) -> tuple[torch.Tensor, float]:
        """Both channels of a pair have its angle: [positions, 1, 1, w_r]; and the factor."""
        if self.config.rope_type == "yarn":
            angles, mscale = self.rotary_pos_emb.get_emb(num_positions)
        else:
            angles, mscale = self.rotary_pos_emb.get_emb(num_positions), 1.0
        return angles.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1), mscale


class LatentDotProductAttention(DotProductAttention):
    """Megatron-Core's own core attention, which knows keys and values of one width only."""

    def __init__(
        self, *args, k_channels: int | None = None, v_channels: int | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels


def _whole(low: torch.Tensor, width: int) -> torch.Tensor:
    """A down-projection, of which tensor-parallel ranks may hold parts."""
    return low if low.shape[-1] == width else gather_from_tensor_model_parallel_region(low)
