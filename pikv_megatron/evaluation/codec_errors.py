"""What codecs lose of keys and values, measured on the pages that are really sealed.

Legend: ng KV heads, c pages, S tokens a page, w width.
"""

from functools import partial

import torch
from torch import Tensor

from pikv_megatron.transformer.context import PiKVInferenceContext


class CodecErrors:
    """Restores every page that this rank seals, and compares.

    Args:
        context: its stores are observed.

    Attributes:
        lost: [layers, 2, ng], float64, squared error of keys and of values, summed.
        whole: likewise, their squares.
    """

    def __init__(self, context: PiKVInferenceContext):
        self._stores = [layer.store for layer in context.layers.values()]
        num_groups = self._stores[0].pool.kv.keys.shape[0]
        device = self._stores[0].table.count.device
        self.lost, self.whole = torch.zeros(
            2, len(self._stores), 2, num_groups, dtype=torch.float64, device=device
        )
        for index, store in enumerate(self._stores):
            store.on_seal = partial(self._compare, index)

    def relative(self) -> Tensor:
        """[layers, 2, ng], |x - x^| / |x|."""
        return (self.lost / self.whole.clamp(min=1e-300)).sqrt()

    def _compare(
        self, index: int, keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor
    ) -> None:
        """Pages [ng, c, S, w] that were sealed as the pages [c] of the sequences `slots` [c]."""
        restored = self._stores[index].restore(pages, slots)
        for side, (x, stored) in enumerate(zip((keys, values), restored)):
            self.lost[index, side] += (stored.double() - x.double()).square().sum((1, 2, 3))
            self.whole[index, side] += x.double().square().sum((1, 2, 3))
