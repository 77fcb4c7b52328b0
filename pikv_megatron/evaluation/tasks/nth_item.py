"""The n-th item of a kind in a conversation (MRCR's shape, arXiv 2409.12640)."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import names, sentence

ORDINALS = ("first", "second", "third")


class NthItem(TextTask):
    """Lines were written about each of some subjects, several about each; one is asked for."""

    name = "nth_item"

    def problem(self, rng, length):
        kinds = names(rng, 4)
        lines = {kind: [sentence(rng) for _ in ORDINALS] for kind in kinds}
        wanted, place = rng.choice(kinds), rng.randrange(len(ORDINALS))
        facts = [
            f"\nUser: Write the {ordinal} line about {kind}.\nAssistant: {lines[kind][i]}\n"
            for i, ordinal in enumerate(ORDINALS) for kind in rng.sample(kinds, len(kinds))
        ]
        question = (
            f"\nUser: Say the {ORDINALS[place]} line about {wanted} again.\nAssistant:"
        )
        words = lines[wanted][place].rstrip(".").split()
        return Problem([Turn(question, [f" {word}" for word in words], "")], facts)
