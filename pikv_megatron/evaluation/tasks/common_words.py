"""Common words, an aggregation shape of RULER (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import NAMES


class CommonWords(TextTask):
    """The three words that stand ten times as often as the others."""

    name = "common_words"
    weights = [10.0] * 3 + [1.0] * (len(NAMES) - 3)

    def problem(self, rng, length):
        common = rng.sample(NAMES, 3)
        turn = Turn("\n\nThe 3 most common words above are:", [f" {word}" for word in common])
        return Problem([turn])

    def filler(self, rng, problem):
        common = [piece.strip() for piece in problem.turns[0].pieces]
        words = common + [word for word in NAMES if word not in common]
        while True:
            yield " " + rng.choices(words, self.weights)[0]
