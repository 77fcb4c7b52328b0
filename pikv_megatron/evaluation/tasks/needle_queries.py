"""Several needles that are all asked for: RULER's multi-query shape (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.needle import TOKENS_PER_NEEDLE, asked, told
from pikv_megatron.evaluation.tasks.prose import names, number


class NeedleQueries(TextTask):
    """The numbers of several keys, asked one after the other."""

    name = "needle_queries"

    def problem(self, rng, length):
        keys = names(rng, max(4, length // TOKENS_PER_NEEDLE))
        values = {key: number(rng) for key in keys}
        turns = [Turn(asked(key), [f" {values[key]}"]) for key in rng.sample(keys, 4)]
        return Problem(turns, [told(key, values[key]) for key in keys])
