"""Runs the tasks over one cache after the other, the lossless one first."""

from typing import Callable

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.codec_errors import CodecErrors
from pikv_megatron.evaluation.figures import Evaluation, Figures, judge, summed
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import TeacherForcing
from pikv_megatron.layer_options import LayerOptions
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.layer_shapes import layer_shapes

LOSSLESS = "lossless"


class Evaluator:
    """Every cache is fed the same sequences in the same batches.

    Args:
        model: with PiKV layers, of any configuration: contexts bring their own.
        vocab_size: ids that can be predicted.
        tasks: by name, of one length.
        batch_size: sequences of all ranks that are fed at once.
    """

    def __init__(
        self, model: GPTModel, vocab_size: int, tasks: dict[str, Task], batch_size: int
    ):
        self._model, self._vocab_size = model, vocab_size
        self._tasks, self._batch_size = tasks, batch_size
        # By task, a tensor a batch: this rank's log-probabilities from the lossless cache.
        self._reference: dict[str, list[Tensor]] = {}

    def check(self, pikv: PiKVConfig) -> None:
        """See that a configuration fits the model.

        Raises:
            ValueError: it does not.
        """
        pikv.resolve(layer_shapes(self._model))

    def num_steps(self, pikv: PiKVConfig) -> int:
        """Forward passes of a `run`."""
        return sum(
            -(-batch.prompt_len // pikv.prefill_chunk_size) + batch.num_decode_steps
            for task in self._tasks.values() for batch in task.batches(self._batch_size)
        )

    def run(self, name: str, pikv: PiKVConfig, on_step: Callable[[], None]) -> Evaluation:
        """Measure one cache; the first run's is the reference, so it is to be lossless."""
        context = self._new_context(pikv)
        forcing = TeacherForcing(self._model, context, self._vocab_size, on_step)
        errors = CodecErrors(context)
        figures = {
            task: self._measure(task, forcing, context.ep_group) for task in self._tasks
        }
        num_bytes = torch.tensor(context.allocated_bytes(), device=forcing.device)
        errors.lost, errors.whole = (
            summed(x, context.ep_group) for x in (errors.lost, errors.whole)
        )
        return Evaluation(
            name, pikv, figures, int(summed(num_bytes, context.ep_group)), _token_bytes(context),
            errors.relative().tolist(),
        )

    def _new_context(self, pikv: PiKVConfig) -> PiKVInferenceContext:
        per_rank = -(-self._batch_size // self._model.pg_collection.ep.size())
        longest = max(task.ids.shape[1] for task in self._tasks.values())
        return PiKVInferenceContext.for_model(self._model, pikv, per_rank, longest)

    def _measure(self, name: str, forcing: TeacherForcing, group) -> Figures:
        forcing.reset()
        judged = torch.zeros(4, dtype=torch.float64)
        for index, batch in enumerate(self._tasks[name].batches(self._batch_size)):
            logprobs = forcing.logits(batch).log_softmax(dim=2)
            reference = self._reference_of(name, index, logprobs)
            targets = batch.ids[:, batch.prompt_len :]
            own = forcing.own(targets), forcing.own(batch.is_judged)
            judged += judge(logprobs, *own, reference)
        pages = [summed(counts, group) for counts in forcing.counter.counts()]
        judged = summed(judged.to(forcing.device), group)
        return Figures.of(judged, pages, forcing.step_seconds)

    def _reference_of(self, name: str, index: int, logprobs: Tensor) -> Tensor:
        known = self._reference.setdefault(name, [])
        if index == len(known):
            known.append(logprobs)
        return known[index]


def _token_bytes(context: PiKVInferenceContext) -> float:
    """Of the pools of all layers that have any, for a token that they have room for."""
    total = 0.0
    for layer in context.sharded_layers:
        pool = layer.store.pool
        total += sum(t.nbytes for t in pool.tensors()) / pool.position.numel()
    return total


def lossless(pikv: PiKVConfig) -> PiKVConfig:
    """The same sizes and placement with lossless methods."""
    return pikv.model_copy(update={"layers": (), **LayerOptions().__dict__})
