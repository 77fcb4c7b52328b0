"""The contestants: one model each, one cache each, one token a step.

Legend: L tokens of the longest sequence, n sequences of this rank, ng KV heads, hn head width.
"""

from abc import ABC, abstractmethod
from typing import Iterator, Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.dense_context import DenseAttention, DenseContext
from pikv_megatron.benchmarks.model.workload import LayerKV, Workload


class Contestant(ABC):
    """Decodes a workload token by token.

    Args:
        model: made for this contestant's kind of cache; the weights are everyone's.
        workload: what is cached, and how sequences are dealt over ranks.

    Attributes:
        is_lossless: its logits must be those of every other lossless one.
    """

    is_lossless = True

    def __init__(self, model: torch.nn.Module, workload: Workload):
        self.model = model
        self.workload = workload
        self.device = next(model.parameters()).device
        self._own = list(workload.own)

    @abstractmethod
    def fill(self, layers: Sequence[LayerKV]) -> None:
        """Cache the context; called once."""

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token to every sequence [batch_size]; logits [n, vocab] of this rank's."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Of the cache on this rank, all that belongs to it."""

    def attention_bounds(self) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        """Layer by layer, the modules between whose calls the attention lies.

        It begins with a token's query, key and value, before RoPE, and ends with its output: the
        projections on either side are the same over every cache.
        """
        for layer in self.model.decoder.layers:
            yield layer.self_attention.linear_qkv, layer.self_attention.linear_proj


class StockContestant(Contestant):
    """Megatron-Core's static inference context: keys are kept before RoPE, rotated on reading.

    All sequences have one length; a rank without any runs one row.
    """

    def __init__(self, model: GPTModel, workload: Workload):
        super().__init__(model, workload)
        self._rows = max(1, len(self._own))
        self.context = self._new_context()

    def fill(self, layers):
        for number, layer in enumerate(layers, start=1):
            memory = self._memory(layer.raw_keys), self._memory(layer.values)
            self.context.key_value_memory_dict[number] = memory
        # The row of a rank without sequences begins with an empty cache.
        self.context.sequence_len_offset = self.workload.context_len if self._own else 0
        self.context.enable_decode_mode()

    def step(self, tokens):
        shape = self._rows, 1
        positions = torch.full(shape, self.context.sequence_len_offset, device=self.device)
        ids = torch.zeros_like(positions)
        ids[: len(self._own), 0] = tokens[self._own].to(self.device)
        logits = self.model(
            ids, positions, None, inference_context=self.context, runtime_gather_output=True
        )
        self.context.sequence_len_offset += 1
        return logits[: len(self._own), -1]

    def cache_bytes(self):
        return sum(t.nbytes for pair in self.context.key_value_memory_dict.values() for t in pair)

    def _new_context(self) -> StaticInferenceContext:
        return StaticInferenceContext(self._rows, self.workload.capacity)

    def _memory(self, cached: torch.Tensor) -> torch.Tensor:
        """[L, n, ng, hn] -> [capacity, rows, ng, hn]."""
        memory = cached.new_zeros(self.workload.capacity, self._rows, *cached.shape[2:])
        memory[: cached.shape[0], : cached.shape[1]] = cached
        return memory


class DenseContestant(StockContestant):
    """The dense reference, with the lean step of a PiKV layer: what is compared is the cache.

    Args:
        attention: how it attends to the whole cache.
    """

    def __init__(self, model: GPTModel, workload: Workload, attention: DenseAttention):
        self._attention = attention
        super().__init__(model, workload)

    def fill(self, layers):
        super().fill([layer._replace(raw_keys=layer.keys) for layer in layers])

    def _new_context(self):
        counts = [max(1, count) for count in self.workload.counts_by_rank]
        group = self.model.pg_collection.ep if len(counts) > 1 else None
        return DenseContext(
            self._rows, self.workload.capacity, self._attention, counts, group
        )

    def _memory(self, cached):
        """[L, n, ng, hn] -> [rows, ng, capacity, hn]."""
        return super()._memory(cached).permute(1, 2, 0, 3).contiguous()
