"""A needle among others: RULER's multi-key shape (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.needle import TOKENS_PER_NEEDLE, asked, told
from pikv_megatron.evaluation.tasks.prose import names, number


class NeedleAmongKeys(TextTask):
    """One number to find among those of many other keys."""

    name = "needle_keys"

    def problem(self, rng, length):
        keys = names(rng, max(2, length // TOKENS_PER_NEEDLE))
        values = [number(rng) for _ in keys]
        wanted = rng.randrange(len(keys))
        turn = Turn(asked(keys[wanted]), [f" {values[wanted]}"])
        return Problem([turn], list(map(told, keys, values)))
