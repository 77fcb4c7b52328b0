"""A prompt in one of Megatron's layers, for retention policies that score its tokens."""

import torch
from torch import Tensor

from pikv_megatron.retention.prompt import LayerSizes, Prompt


class LayerPrompt(Prompt):
    """See `Prompt` for what it is, and for the legend.

    Args:
        attention: Megatron's `SelfAttention`.
        hidden: [t, h].
        keys: [t, ng, w], rotated.
        values: [t, ng, w].
        past: tokens of the sequence before these.
        table: [positions, 1, 1, w], angles by position; None: the layer does not rotate.

    Raises:
        ValueError: the layer rotates in a way that scorers do not know.
    """

    def __init__(
        self, attention, hidden: Tensor, keys: Tensor, values: Tensor, past: int,
        table: Tensor | None,
    ):
        config, width = attention.config, attention.hidden_size_per_attention_head
        if table is not None and (config.rotary_interleaved or table.shape[-1] != width):
            raise ValueError(
                "retention: a policy that scores prompts needs RoPE of whole heads by halves, and "
                f"layer {attention.layer_number} turns {table.shape[-1]} of {width} channels, "
                f"interleaved: {config.rotary_interleaved}; name a policy of another kind"
            )
        self.sizes = LayerSizes(
            attention.layer_number - 1, config.num_layers, config.hidden_size,
            attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition,
            width,
        )
        self.hidden, self.keys, self.values, self.past = hidden, keys, values, past
        self._attention, self._table = attention, table

    def project(self, hidden):
        query, key = self._attention.get_query_key_value_tensors(hidden.unsqueeze(1))[:2]
        return query.squeeze(1), key.squeeze(1)

    def angles(self, positions):
        # They grow evenly; a scorer may look further ahead than the table reaches.
        if self._table is None:
            return torch.zeros(len(positions), self.sizes.head_width, device=positions.device)
        return positions.unsqueeze(1) * self._table[1, 0, 0]
