"""The cache of a layer whose queries see a sliding window: all of it lies on the home rank.

A token that leaves the window is overwritten by the next one, so nothing is flushed to shards, and
no method of the configuration has anything to choose.

Legend: t tokens of this home rank's step, np query heads, ng KV heads, w_k and w_v widths of keys
and values, W tokens of the window.
"""

import torch

from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.ops.append_kv import append_kv
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.sink_logit import with_sink
from pikv_megatron.ops.window_attention import window_attention
from pikv_megatron.types import AttentionState, KVPages, PageList


class SlidingCache:
    """Stores and reads the last W tokens of a layer's sequences; position p lies at p % W.

    Args:
        spec: the layer.
        num_slots: sequences of this home rank.

    Attributes:
        spec: as given.
        keys: [ng, slots, W, w_k].
        values: [ng, slots, W, w_v].
    """

    scores_prompts = False
    expert_source = None

    def __init__(self, spec: LayerSpec, num_slots: int):
        kv, self.spec, self._window = spec.kv, spec, spec.sliding_window
        shape = kv.num_groups, num_slots, self._window
        self.keys = torch.zeros(*shape, kv.key_width, dtype=kv.dtype, device=kv.device)
        self.values = torch.zeros(*shape, kv.value_width, dtype=kv.dtype, device=kv.device)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StepPlan,
        sink: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What a step's tokens see of the window, themselves included.

        Args:
            query: [t, np, w_k], in the order of `StepPlan.rows`.
            key: [t, ng, w_k].
            value: [t, ng, w_v].
            sink: [np], a learned logit of nothing.

        Returns:
            [t, np, w_v].
        """
        first = plan.decode.num_rows
        states = []
        if first:
            states.append(self._attend_decode(query[:first], key[:first], value[:first], plan))
        for row, step_row in zip(plan.prefill.rows, plan.rows[first:]):
            tokens = slice(first + row.tokens.start, first + row.tokens.stop)
            slot = step_row.sequence.slot - plan.first_slot
            states.append(self._attend_prompt(
                query[tokens], key[tokens], value[tokens], slot, row.past
            ))
        outputs = [with_sink(state, sink) for state in states]
        if not outputs:
            return value.new_empty(0, self.spec.num_heads, self.spec.kv.value_width)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def settle(self, plan: StepPlan, experts: torch.Tensor | None) -> None:
        """Nothing leaves the window; what slid out of it was overwritten."""

    def release(self, slot: int, window_slot: int | None) -> None:
        """The next sequence reads no further than it wrote."""

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """All tensors, by what they are for."""
        return {"windows": [self.keys, self.values]}

    def check_integrity(self) -> None:
        """Every slot has its own memory."""

    def _attend_decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StepPlan
    ) -> AttentionState:
        """Tokens [n, ..] of the rows that decode; each is written before it attends."""
        slots, (places, lens) = plan.decode.numbers.window_slots, plan.decode.sliding(self._window)
        append_kv(key.transpose(0, 1), value.transpose(0, 1), self.keys, self.values, slots, places)
        pages = KVPages(self.keys, self.values)
        reads = PageList(pages, slots.unsqueeze(1), lens)
        state = decode_attention(query.unsqueeze(1), [reads], self.spec.softmax_scale)[0]
        return AttentionState(state.out.squeeze(1), state.lse.squeeze(1))

    def _attend_prompt(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slot: int, past: int
    ) -> AttentionState:
        """Tokens [s, ..] of one prompt; its last ones stay."""
        near = self._places(max(0, past - self._window + 1), past)
        keys, values = (
            torch.cat([ring[:, slot, near].transpose(0, 1), new])
            for ring, new in ((self.keys, key), (self.values, value))
        )
        state = window_attention(query, keys, values, self._window, self.spec.softmax_scale)
        kept = min(len(key), self._window)
        places = self._places(past + len(key) - kept, past + len(key))
        self.keys[:, slot, places] = key[-kept:].transpose(0, 1)
        self.values[:, slot, places] = value[-kept:].transpose(0, 1)
        return state

    def _places(self, first: int, last: int) -> torch.Tensor:
        return torch.arange(first, last, device=self.keys.device) % self._window
