"""OLMoE's attention details: a norm over all heads of a projection, and clipped q, k and v.

Legend: sq sequence, b batch, np attention heads and ng query groups of this tensor-parallel rank,
hn width of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class ProjectionNorm(torch.nn.Module):
    """RMS norm over a whole projection, where Megatron-Core's q and k norms see head by head.

    Tensor-parallel ranks hold some of the heads each and share the sum of squares.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-5, **kwargs):
        super().__init__()
        heads = self._num_heads(config) // config.tensor_model_parallel_size
        self.width = self._num_heads(config) * hidden_size
        self.eps = eps
        self.clip = config.clip_qkv
        self.weight = torch.nn.Parameter(
            torch.ones(
                heads * hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )

    def _num_heads(self, config: TransformerConfig) -> int:
        raise NotImplementedError

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        """Normalise `[sq, b, np, hn]` (or `[sq, b, ng, hn]`) over its last two dimensions."""
        x = projected.flatten(-2).float()
        squares = x.square().sum(-1, keepdim=True)
        group = parallel_state.get_tensor_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(squares, group=group)
        x = self.weight * (x * torch.rsqrt(squares / self.width + self.eps)).to(projected.dtype)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        return x.view_as(projected)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, split over tensor-parallel ranks as the heads are."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class QueryProjectionNorm(ProjectionNorm):
    """The norm of all queries."""

    def _num_heads(self, config: TransformerConfig) -> int:
        return config.num_attention_heads


class KeyProjectionNorm(ProjectionNorm):
    """The norm of all keys."""

    def _num_heads(self, config: TransformerConfig) -> int:
        return config.num_query_groups


def clip_values(linear_qkv: type) -> type:
    """A `linear_qkv` whose values are clipped; the norms above clip queries and keys."""

    class ValueClippingLinear(linear_qkv):
        def forward(self, *args, **kwargs):
            output, bias = super().forward(*args, **kwargs)
            config = self.config
            groups = config.num_query_groups // config.tensor_model_parallel_size
            heads = output.unflatten(-1, (groups, -1))
            queries_keys, values = heads.split(
                [heads.shape[-1] - config.kv_channels, config.kv_channels], dim=-1
            )
            values = values.clamp(-config.clip_qkv, config.clip_qkv)
            return torch.cat([queries_keys, values], dim=-1).flatten(-2), bias

    return ValueClippingLinear
