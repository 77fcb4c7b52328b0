"""Copying a passage out of a long text, word for word."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import NAMES, names


class Copying(TextTask):
    """A list of words that stood somewhere is to be said again, from its first word on."""

    name = "copying"
    num_words = 24

    def problem(self, rng, length):
        (title,) = names(rng, 1)
        first, *words = rng.choices(NAMES, k=self.num_words)
        passage = f"\nThe {title} list: {first} {' '.join(words)}.\n"
        question = f"\n\nThe {title} list once more.\nThe {title} list: {first}"
        return Problem([Turn(question, [f" {word}" for word in words], "")], [passage])
