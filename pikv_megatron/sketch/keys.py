"""A page's own keys, judged by the rank that stores them."""

from typing import ClassVar, Literal

from pikv_megatron.sketch.base import SketchOptions


class KeysOptions(SketchOptions):
    """The stored keys themselves, judged by their owners: nothing is kept twice, all keys are read,
    and where pages are far, queries travel once more.
    """

    name: Literal["keys"] = "keys"

    can_bound: ClassVar[bool] = True

    def build(self, kv, page_size, num_slots, bounds=False):
        return None
