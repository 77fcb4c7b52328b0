"""A transformer layer whose inference is what it computes and nothing else.

Legend: sq tokens of a row, b rows of the batch, h hidden size.
"""

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from pikv_megatron.transformer.lean_moe import LeanMoELayer


class LeanLayerMixin:
    """`TransformerLayer`, whose steps with its own kind of cache are lean.

    Megatron's layer goes through the steps of dropout, recomputing, offloading and cross attention,
    none of which does anything in inference; together they take as long as the attention over a
    short context. A layer that is built or configured for more stays as it is.

    Attributes:
        lean_context: the kind of cache, to be named by the class; see `LeanMoELayer` for what it
            tells.
    """

    lean_context: type[BaseInferenceContext]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_plain = _is_plain(self)

    def forward(self, hidden_states, *args, **kwargs):
        context = kwargs.get("inference_context")
        is_lean = self.is_plain and not args and isinstance(context, self.lean_context)
        if self.training or not is_lean:
            return super().forward(hidden_states, *args, **kwargs)
        attended = self.self_attention(
            self.input_layernorm(hidden_states), kwargs.get("attention_mask"),
            inference_context=context, rotary_pos_emb=kwargs.get("rotary_pos_emb"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        hidden_states = _added(hidden_states, *attended)
        normed = self.pre_mlp_layernorm(hidden_states)
        if isinstance(self.mlp, LeanMoELayer):
            output = self.mlp(normed, context=context)
        else:
            output = self.mlp(normed)
        return _added(hidden_states, *output), None


def _is_plain(layer: TransformerLayer) -> bool:
    """Whether in inference it is attention and MLP, each behind a norm and added to its input."""
    config = layer.config
    bases = [
        base for base in type(layer).__mro__
        if issubclass(base, TransformerLayer) and not issubclass(base, LeanLayerMixin)
    ]
    return (
        all(base.__module__ == TransformerLayer.__module__ for base in bases)
        and isinstance(layer.cross_attention, IdentityOp)
        and isinstance(layer.pre_cross_attn_layernorm, IdentityOp)
        and config.mlp_chunks_for_prefill == 1
        and not config.fp32_residual_connection
        and not config.inference_fuse_tp_communication
        # Megatron-Core 0.19's: a norm that returns two tensors.
        and not getattr(config, "fused_residual_rmsnorm", False)
    )


def _added(
    residual: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return residual + (output if bias is None else output + bias)
