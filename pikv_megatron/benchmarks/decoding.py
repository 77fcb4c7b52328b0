"""The contestants: one model each, one cache each, one token a step.

Legend: L tokens of the context, n sequences of this rank, ng KV heads, hn head width.
"""

import math
from abc import ABC, abstractmethod
from typing import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.dense_context import DenseAttention, DenseContext
from pikv_megatron.benchmarks.workload import LayerKV, Workload
from pikv_megatron.cache.step_plan import StepRow
from pikv_megatron.config import PiKVConfig
from pikv_megatron.transformer.context import PiKVInferenceContext


class Contestant(ABC):
    """Decodes a workload token by token.

    Args:
        model: built for this contestant's kind of cache; the weights are everyone's.
        workload: what is cached, and how sequences are dealt over ranks.
    """

    def __init__(self, model: GPTModel, workload: Workload):
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

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, context) -> torch.Tensor:
        """Run the model on [rows, 1] with rows padded: a rank without sequences runs one row."""
        ids = torch.zeros_like(positions)
        ids[: len(self._own), 0] = tokens[self._own].to(self.device)
        logits = self.model(
            ids, positions, None, inference_context=context, runtime_gather_output=True
        )
        return logits[: len(self._own), -1]


class StockContestant(Contestant):
    """Megatron-Core's static inference context: keys are kept before RoPE, rotated on reading."""

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
        logits = self._forward(tokens, positions, self.context)
        self.context.sequence_len_offset += 1
        return logits

    def _new_context(self) -> StaticInferenceContext:
        return StaticInferenceContext(self._rows, self.workload.capacity)

    def _memory(self, cached: torch.Tensor) -> torch.Tensor:
        """[L, n, ng, hn] -> [capacity, rows, ng, hn]."""
        memory = cached.new_zeros(self.workload.capacity, self._rows, *cached.shape[2:])
        memory[: cached.shape[0], : cached.shape[1]] = cached
        return memory


class DenseContestant(StockContestant):
    """The dense reference.

    Args:
        attention: how it attends to the whole cache.
    """

    def __init__(self, model: GPTModel, workload: Workload, attention: DenseAttention):
        self._attention = attention
        super().__init__(model, workload)

    def fill(self, layers):
        super().fill([layer._replace(raw_keys=layer.keys) for layer in layers])

    def _new_context(self):
        return DenseContext(self._rows, self.workload.capacity, self._attention)

    def _memory(self, cached):
        """[L, n, ng, hn] -> [rows, ng, capacity, hn]."""
        return super()._memory(cached).permute(1, 2, 0, 3).contiguous()


class PiKVContestant(Contestant):
    """The cache of this package.

    Args:
        pikv: its configuration.
    """

    def __init__(self, model: GPTModel, workload: Workload, pikv: PiKVConfig):
        super().__init__(model, workload)
        num_ranks, batch_size = workload.num_ranks, workload.batch_size
        group = model.pg_collection.ep if num_ranks > 1 else None
        self.pikv = pikv
        self.context = PiKVInferenceContext(
            -(-batch_size // num_ranks), workload.capacity, pikv, group
        )
        sequences = [self.context.start(i % num_ranks) for i in range(batch_size)]
        self._by_rank = [sequences[rank::num_ranks] for rank in range(num_ranks)]
        self.context.reserve([(s, workload.capacity) for s in sequences])

    def fill(self, layers):
        length = self.workload.context_len
        chunk = self.pikv.prefill_chunk_size or length
        for first in range(0, length, chunk):
            self._begin_step(min(chunk, length - first))
            for number, layer in enumerate(layers, start=1):
                self._store(number, layer, slice(first, first + chunk))
            self.context.finish_step()

    def step(self, tokens):
        plan = self._begin_step(1)
        positions = torch.zeros(plan.max_rows, 1, dtype=torch.int64, device=self.device)
        positions[: plan.num_rows] = plan.positions.t()
        logits = self._forward(tokens, positions, self.context)
        self.context.finish_step()
        return logits

    def _begin_step(self, count: int):
        rows = [[StepRow(s, count) for s in own] for own in self._by_rank]
        self.context.begin_step(rows, self.device)
        return self.context.plan

    def _store(self, number: int, layer: LayerKV, tokens: slice) -> None:
        """What a forward pass over these tokens does with the cache."""
        plan, keys = self.context.plan, layer.keys[tokens]
        num_groups, width = keys.shape[2:]
        scale = self.model.config.softmax_scale or 1.0 / math.sqrt(width)
        cache = self.context.layer(number, num_groups, width, scale, keys.dtype, keys.device)
        cache.hold(keys, layer.values[tokens], plan)
        cache.settle(plan, self._experts(keys.shape[0]))

    def _experts(self, num_tokens: int) -> torch.Tensor | None:
        """[n, num_tokens, replicas] of made-up choices, where placement asks for them."""
        kept, num_experts = self.context.keeps_experts, self.model.config.num_moe_experts
        if not kept:
            return None
        first = torch.arange(num_tokens, device=self.device).view(1, -1, 1)
        experts = (first + torch.arange(kept, device=self.device)) % num_experts
        return experts.expand(len(self._own), -1, -1).to(torch.int16)
