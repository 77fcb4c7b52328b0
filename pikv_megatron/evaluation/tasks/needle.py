"""A needle in a haystack: the simplest of RULER's four shapes (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import names, number

TOKENS_PER_NEEDLE = 128  # where there are distractors


def told(key: str, value: str) -> str:
    """A needle."""
    return f" The special magic number for {key} is {value}."


def asked(key: str) -> str:
    """The question, whose answer continues it."""
    return f"\n\nRecall: The special magic number for {key} is"


class SingleNeedle(TextTask):
    """One number to find."""

    name = "needle"

    def problem(self, rng, length):
        (key,), value = names(rng, 1), number(rng)
        return Problem([Turn(asked(key), [f" {value}"])], [told(key, value)])
