"""Runs tasks over caches, the lossless one first."""

from collections.abc import Callable, Sequence

from megatron.core.models.gpt import GPTModel

from pikv_megatron.config import PiKVConfig
from pikv_megatron.evaluation.figures import Figures
from pikv_megatron.evaluation.judge import Judge, Reference
from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.teacher_forcing import TeacherForcing
from pikv_megatron.evaluation.watch import Watch
from pikv_megatron.layer_options import LayerOptions
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.transformer.layer_shapes import layer_shapes

LOSSLESS = "lossless"


class Evaluator:
    """Every cache is fed the same sequences in the same batches.

    Args:
        model: with PiKV layers, of any configuration: contexts bring their own.
        vocab_size: ids that can be predicted.
        batch_size: sequences of all ranks that are fed at once.
    """

    def __init__(self, model: GPTModel, vocab_size: int, batch_size: int):
        self._model, self._vocab_size, self._batch_size = model, vocab_size, batch_size

    def check(self, pikv: PiKVConfig) -> None:
        """See that a configuration fits the model.

        Raises:
            ValueError: it does not.
        """
        pikv.resolve(layer_shapes(self._model))

    def num_steps(self, parts: Sequence[Task], pikv: PiKVConfig) -> int:
        """Forward passes of a `run`."""
        ranks = self._model.pg_collection.ep.size()
        return sum(
            -(-len(batch.ids) // ranks) * -(-batch.prompt_len // pikv.prefill_chunk_size)
            + batch.num_decode_steps
            for part in parts for batch in part.batches(self._batch_size)
        )

    def run(
        self, parts: Sequence[Task], pikv: PiKVConfig, reference: Reference,
        on_step: Callable[[], None],
    ) -> Figures:
        """Measure one cache on a task's parts.

        Args:
            reference: what the lossless cache said; empty: this one is the lossless, and fills it.
        """
        most = min(self._batch_size, max(len(part.ids) for part in parts))
        per_rank = -(-most // self._model.pg_collection.ep.size())
        longest = max(part.ids.shape[1] for part in parts)
        context = PiKVInferenceContext.for_model(self._model, pikv, per_rank, longest)
        watch, judge = Watch(self._model, context), Judge()
        forcing = TeacherForcing(self._model, context, self._vocab_size, on_step, watch)
        is_first = not reference.tasks
        if is_first:
            reference.tasks = [b for part in parts for b in part.batches(self._batch_size)]
            reference.logprobs = [[] for _ in reference.tasks]
        for task, logprobs in zip(reference.tasks, reference.logprobs):
            targets = forcing.own(task.ids[:, task.prompt_len :])
            judge.start(targets, forcing.own(task.answer))
            # Greedy text is written into `task.ids`, and so into `targets`, as it comes.
            for place, logits in forcing.feed(task, follows=is_first and task.is_free):
                heard = judge.hear(place, logits, None if is_first else logprobs[place])
                if is_first:
                    logprobs.append(heard)
            judge.end()
        return watch.figures(judge.sums)


def lossless(pikv: PiKVConfig) -> PiKVConfig:
    """The same sizes and placement with lossless methods."""
    return pikv.model_copy(update={"layers": (), **LayerOptions().__dict__})
