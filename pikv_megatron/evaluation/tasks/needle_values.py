"""Several needles of one key: RULER's multi-value shape (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.needle import told
from pikv_megatron.evaluation.tasks.prose import names, number


class NeedleValues(TextTask):
    """All numbers of one key, in their order."""

    name = "needle_values"

    def problem(self, rng, length):
        (key,), values = names(rng, 1), [number(rng) for _ in range(4)]
        question = (
            f"\n\nRecall, in their order: The {len(values)} special magic numbers for {key} are"
        )
        turn = Turn(question, [f" {value}" for value in values])
        return Problem([turn], [told(key, value) for value in values])
