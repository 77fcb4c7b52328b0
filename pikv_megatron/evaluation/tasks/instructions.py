"""Instructions from the beginning that must survive eviction (arXiv 2510.00231)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import names, number


class Instructions(TextTask):
    """What the opening told to answer to each of four words, asked long afterwards."""

    name = "instructions"

    def problem(self, rng, length):
        keys = names(rng, 4)
        codes = [number(rng, 4) for _ in keys]
        rules = "".join(
            f'When the user says "{key}", answer "code {code}".\n' for key, code in zip(keys, codes)
        )
        order = rng.sample(range(4), 4)
        turns = [Turn(f'\n\nUser: {keys[i]}\nAnswer: code', [f" {codes[i]}"]) for i in order]
        return Problem(turns, opening=f"Instructions.\n{rules}Now comes a text.\n")
