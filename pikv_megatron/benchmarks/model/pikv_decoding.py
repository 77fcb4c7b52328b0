"""The contestants that decode over a PiKV cache.

Legend: L tokens of the longest sequence, n sequences of this rank, t tokens of a step, ng KV heads,
hn head width.
"""

from typing import Sequence

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.benchmarks.model.workload import LayerKV, Workload
from pikv_megatron.cache.step.step_plan import StepPlan
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.config import PiKVConfig
from pikv_megatron.layer_options import LayerOptions
from pikv_megatron.transformer.context import PiKVInferenceContext

# The defaults are lossless; a sketch or a budget alone loses nothing.
LOSSLESS = LayerOptions()
LOSSY_FIELDS = ("router", "selector", "retention", "codec")


def is_lossless(options: LayerOptions) -> bool:
    """Whether a layer's cache reads every token, as it was computed."""
    return all(getattr(options, name) == getattr(LOSSLESS, name) for name in LOSSY_FIELDS)


class PiKVContestant(Contestant):
    """The cache of this package. Its sequences may differ in length.

    Args:
        pikv: its configuration.
    """

    def __init__(self, model: GPTModel, workload: Workload, pikv: PiKVConfig):
        super().__init__(model, workload)
        num_ranks, batch_size = workload.num_ranks, workload.batch_size
        self.pikv = pikv
        self.context = PiKVInferenceContext.for_model(
            model, pikv, -(-batch_size // num_ranks), workload.capacity
        )
        self.context.keep_all_logits()
        self._sequences = [self.context.start(rank) for rank in range(num_ranks)]
        self._feed_one_token()
        self._sequences = [self.context.start(i % num_ranks) for i in range(batch_size)]
        self._column = {self._sequences[i].slot: column for column, i in enumerate(self._own)}
        self.context.reserve([(s, workload.capacity) for s in self._sequences])
        caches = self.context.layers.values()
        self.is_lossless = all(is_lossless(cache.spec.options) for cache in caches)

    def _feed_one_token(self) -> None:
        """To sequences that end with it: the cache learns how the model rotates its keys."""
        plan = self._begin_step([1] * len(self._sequences))
        self._run(torch.zeros_like(plan.tokens.positions), plan)
        for sequence in self._sequences:
            self.context.release(sequence)

    def fill(self, layers):
        chunk = self.pikv.prefill_chunk_size
        for first in range(0, self.workload.context_len, chunk):
            lengths = self.workload.lengths
            plan = self._begin_step([min(chunk, length - first) for length in lengths])
            for number, layer in enumerate(layers, start=1):
                self._store(number, layer, plan)
            self.context.finish_step()

    def step(self, tokens):
        plan = self._begin_step([1] * self.workload.batch_size)
        ids = torch.zeros_like(plan.tokens.positions)
        ids[: plan.num_tokens] = tokens[self._own].to(self.device)
        return self._run(ids, plan)[0, : plan.num_tokens]

    def cache_bytes(self):
        return self.context.allocated_bytes()

    def prefill(self, prompt):
        chunk = self.pikv.prefill_chunk_size
        for part in prompt.to(self.device).split(chunk):
            self._run(part, self._begin_step([len(part)]))

    def _begin_step(self, counts: Sequence[int]) -> StepPlan:
        """Feed so many tokens to each sequence; to those with less than one, none."""
        num_ranks = self.workload.num_ranks
        rows: list[list[StepRow]] = [[] for _ in range(num_ranks)]
        for index, (sequence, count) in enumerate(zip(self._sequences, counts)):
            if count > 0:
                rows[index % num_ranks].append(StepRow(sequence, count))
        self.context.begin_step(rows, self.device)
        return self.context.plan

    @torch.no_grad()
    def _run(self, ids: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Feed tokens [t]; logits [1, t, vocabulary]."""
        logits = self.model(
            ids.unsqueeze(0), plan.tokens.positions.unsqueeze(0), None,
            inference_context=self.context, runtime_gather_output=True,
        )
        self.context.finish_step()
        return logits

    def _store(self, number: int, layer: LayerKV, plan: StepPlan) -> None:
        """What a forward pass over a step's tokens does with the cache of a layer."""
        cache = self.context.layers[number]
        cache.hold(self._fed(layer.keys, plan), self._fed(layer.values, plan), plan)
        cache.settle(plan, self._experts(plan))

    def _fed(self, cached: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """[L, n, ng, hn] -> [t, ng, hn], row after row."""
        parts = [cached[row.past : row.end, self._column[row.sequence.slot]] for row in plan.rows]
        return torch.cat([cached[:0, :1].flatten(0, 1), *parts])

    def _experts(self, plan: StepPlan) -> torch.Tensor | None:
        """[t, replicas] of made-up choices, where placement asks for them."""
        kept, num_experts = self.context.keeps_experts, self.model.config.num_moe_experts
        if not kept:
            return None
        first = plan.tokens.positions[: plan.num_tokens].unsqueeze(1)
        experts = (first + torch.arange(kept, device=self.device)) % num_experts
        return experts.to(torch.int16)
