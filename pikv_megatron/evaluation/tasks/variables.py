"""Variable tracking, RULER's multi-hop shape (arXiv 2404.06654)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import number

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


class Variables(TextTask):
    """All variables that a value was handed on to, in their order."""

    name = "variables"

    def problem(self, rng, length):
        drawn = ["".join(rng.sample(LETTERS, 3)) for _ in range(8)]
        chains = drawn[:4], drawn[4:]
        values = [number(rng) for _ in chains]
        lines = [[f" VAR {chain[0]} = {value}." for chain, value in zip(chains, values)]]
        for hop in range(1, 4):
            lines.append([f" VAR {chain[hop]} = VAR {chain[hop - 1]}." for chain in chains])
        question = f"\n\nThe 4 variables that have the value {values[0]} are, in their order: VAR"
        turn = Turn(question, [f" {variable}" for variable in chains[0]], ", VAR")
        return Problem([turn], [line for pair in lines for line in pair])
