"""State tracking while decoding: what matters is told behind the prompt, and changes."""

from pikv_megatron.evaluation.tasks.base import Problem, TextTask, Turn
from pikv_megatron.evaluation.tasks.prose import names, number, sentence


class StateTracking(TextTask):
    """Boxes get new contents again and again, and are asked for in between."""

    name = "state"
    num_changes = 12

    def problem(self, rng, length):
        boxes = names(rng, 4)
        held = {box: number(rng, 3) for box in boxes}
        opening = "".join(f"The {box} box holds {held[box]}.\n" for box in boxes)
        turns = []
        for _ in range(self.num_changes):
            changed, asked = rng.choice(boxes), rng.choice(boxes)
            held[changed] = number(rng, 3)
            question = (
                f"\nNow the {changed} box holds {held[changed]}. {sentence(rng)}\n"
                f"Look into the {asked} box: the {asked} box holds"
            )
            turns.append(Turn(question, [f" {held[asked]}"]))
        return Problem(turns, opening=opening, asks_later=True)
