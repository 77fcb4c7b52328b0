"""Feeds given tokens through the cache, whatever the model would have chosen.

Legend: b sequences of all ranks, n of this home rank, L tokens of each, P of its prompt, V ids.
"""

import time
from typing import Callable

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.cache.step_rows import CachedSequence, StepRow
from pikv_megatron.evaluation.page_counter import PageCounter
from pikv_megatron.evaluation.task import Task
from pikv_megatron.transformer.context import PiKVInferenceContext


class TeacherForcing:
    """Prompts in the configured chunks, then token by token, as a decoder would come to them.

    Args:
        model: with PiKV layers.
        context: of the model; its stores are observed.
        vocab_size: V.
        on_step: called after every forward pass.

    Attributes:
        device: of the model.
        counter: what decode steps read.
        step_seconds: of every decode step.
    """

    def __init__(
        self, model: GPTModel, context: PiKVInferenceContext, vocab_size: int,
        on_step: Callable[[], None],
    ):
        self._model, self._context = model, context
        self._vocab_size = vocab_size
        self._on_step = on_step
        self.device = next(model.parameters()).device
        self.counter = PageCounter(context)
        self.step_seconds: list[float] = []
        context.materialize_only_last_token_logits = False

    def reset(self) -> None:
        """Count and time from zero."""
        self.counter.reset()
        self.step_seconds = []

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this home rank: they are dealt in turn."""
        return rows[self._context.rank :: self._context.num_ranks]

    @torch.no_grad()
    def logits(self, batch: Task) -> Tensor:
        """[n, L - P, V], float32, on the host: what the model says before each judged token."""
        ids, length = batch.ids, batch.ids.shape[1]
        sequences = [self._context.start(i % self._context.num_ranks) for i in range(len(ids))]
        self._context.reserve([(sequence, length) for sequence in sequences])
        chunk = self._context.pikv_config.prefill_chunk_size
        for first in range(0, batch.prompt_len, chunk):
            last = min(first + chunk, batch.prompt_len)
            logits = self._step(sequences, ids[:, first:last])
        told = [logits]
        for place in range(batch.prompt_len, length - 1):
            told.append(self._decode(sequences, ids[:, place : place + 1]))
        self.counter.count_end()
        for sequence in sequences:
            self._context.release(sequence)
        return torch.stack(told, dim=1)

    def _decode(self, sequences: list[CachedSequence], ids: Tensor) -> Tensor:
        self.counter.count_step()
        self.counter.is_on = True
        start = time.perf_counter()
        logits = self._step(sequences, ids)
        self.step_seconds.append(time.perf_counter() - start)
        self.counter.is_on = False
        return logits

    def _step(self, sequences: list[CachedSequence], ids: Tensor) -> Tensor:
        """[n, V] behind the last of the tokens ids [b, count]."""
        context, ranks = self._context, self._context.num_ranks
        rows = [StepRow(sequence, ids.shape[1]) for sequence in sequences]
        context.begin_step([rows[rank::ranks] for rank in range(ranks)], self.device)
        plan = context.plan
        fed = torch.zeros(1, plan.num_padded, dtype=torch.int64)
        fed[0, : plan.num_tokens] = self.own(ids).flatten()
        logits = self._model(
            fed.to(self.device), plan.tokens.positions.unsqueeze(0), None,
            inference_context=context,
            runtime_gather_output=True,
        )[0, plan.tokens.last_tokens, : self._vocab_size]
        context.finish_step()
        self._on_step()
        return logits.float().cpu()
