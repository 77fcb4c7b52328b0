"""How long greedy text stays that of the lossless cache."""

from pikv_megatron.evaluation.task import Task
from pikv_megatron.evaluation.tasks.text import Text

MOST_FREE = 64  # tokens


class Greedy(Text):
    """The lossless cache goes on with the same windows; how many tokens another one agrees."""

    name = "greedy"
    num_samples = 8
    is_scored = False

    def build(self, source, length, num_samples, seed):
        (whole,) = super().build(source, length, num_samples, seed)
        return [Task(whole.ids, whole.answer[:, :MOST_FREE], is_free=True)]
