"""Feeds given tokens through the cache, whatever the model would have chosen.

Legend: b sequences of all ranks, n of this home rank, L tokens of each, P of its prompt, T = L - P,
V ids.
"""

import time
from collections.abc import Callable, Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.cache.step.step_rows import CachedSequence, StepRow
from pikv_megatron.evaluation.task import Task
from pikv_megatron.inference.model_runner import only_tokens
from pikv_megatron.transformer.context import PiKVInferenceContext


class Watcher:
    """Is told where a batch has come to; does nothing."""

    def start(self, sequences: list[CachedSequence], own: list[CachedSequence], task: Task) -> None:
        """A batch begins."""

    def before(self, place: int) -> None:
        """A step that decodes comes, after which the token `place` behind the prompt is judged."""

    def after(self, place: int, seconds: float) -> None:
        """It was fed; `seconds` are of this rank's processor, or, on a GPU, by the wall."""

    def end(self) -> None:
        """All was fed, and the sequences still hold their pages."""


class TeacherForcing:
    """Prompts in the configured chunks, one sequence of each home rank after the other, then all
    sequences token by token, as a decoder would come to them.

    Args:
        model: with PiKV layers.
        context: of the model.
        vocab_size: V.
        on_step: called after every forward pass.
        watcher: told of the steps.

    Attributes:
        device: of the model.
    """

    def __init__(
        self, model: GPTModel, context: PiKVInferenceContext, vocab_size: int,
        on_step: Callable[[], None], watcher: Watcher = Watcher(),
    ):
        self._model, self._context = model, context
        self._vocab_size = vocab_size
        self._on_step, self._watcher = on_step, watcher
        self.device = next(model.parameters()).device
        # Logits come to the host at the end of a step, so a GPU is done then.
        is_host = self.device.type == "cpu"
        self._clock = time.process_time if is_host else time.perf_counter
        context.keep_all_logits()

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this home rank: they are dealt in turn."""
        return rows[self._context.rank :: self._context.num_ranks]

    @torch.no_grad()
    def feed(self, task: Task, follows: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Feed all but the last token.

        Args:
            task: one batch.
            follows: write the likeliest token to the next place of `task.ids` before it is fed, in
                the rows of this home rank.

        Yields:
            The place behind the prompt, from 0, of a token, and what the model says before it:
            [n, V], float32, on the host.
        """
        context, ids = self._context, task.ids
        sequences = [context.start(i % context.num_ranks) for i in range(len(ids))]
        context.reserve([(sequence, ids.shape[1]) for sequence in sequences])
        self._watcher.start(sequences, sequences[context.rank :: context.num_ranks], task)
        logits = self._prefill(sequences, ids[:, : task.prompt_len])
        for place in range(task.answer.shape[1]):
            if place:
                logits = self._decode(sequences, task, place)
            if follows:
                self.own(ids)[:, task.prompt_len + place] = logits.argmax(1)
            yield place, logits
        self._watcher.end()
        for sequence in sequences:
            context.release(sequence)

    def _prefill(self, sequences: list[CachedSequence], ids: Tensor) -> Tensor:
        """[n, V] behind the prompts ids [b, P]."""
        ranks, chunk = self._context.num_ranks, self._context.pikv_config.prefill_chunk_size
        told = []
        for first in range(0, len(sequences), ranks):
            now = slice(first, first + ranks)
            for part in ids[now].split(chunk, dim=1):
                logits = self._step(sequences[now], part)
            told.append(logits)
        return torch.cat(told)

    def _decode(self, sequences: list[CachedSequence], task: Task, place: int) -> Tensor:
        at = task.prompt_len + place
        self._watcher.before(place)
        start = self._clock()
        logits = self._step(sequences, task.ids[:, at - 1 : at])
        self._watcher.after(place, self._clock() - start)
        return logits

    def _step(self, sequences: list[CachedSequence], ids: Tensor) -> Tensor:
        """[n, V] behind the last of the tokens ids [b, count]."""
        context, ranks = self._context, self._context.num_ranks
        rows = [StepRow(sequence, ids.shape[1]) for sequence in sequences]
        context.begin_step([rows[rank::ranks] for rank in range(ranks)], self.device)
        plan, own = context.plan, self.own(ids)
        fed = torch.zeros(1, plan.num_padded, dtype=torch.int64)
        fed[0, : plan.num_tokens] = own.flatten()
        with only_tokens(self._model, plan.tokens.last_tokens):
            logits = self._model(
                fed.to(self.device), plan.tokens.positions.unsqueeze(0), None,
                inference_context=context, runtime_gather_output=True,
            )
        context.finish_step()
        self._on_step()
        return logits[: len(own), 0, : self._vocab_size].float().cpu()
