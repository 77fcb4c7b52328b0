"""What codecs lose of keys and values, measured on the pages that are really sealed.

Legend: ng KV heads, c pages, S tokens a page, w width.
"""

from functools import partial

import torch
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.transformer.context import PiKVInferenceContext


class CodecErrors:
    """Restores every page that this rank seals, and compares; and packs what leaves for its shards
    as it is packed for the journey.

    Args:
        context: its stores are observed.

    Attributes:
        lost: [layers, 2, ng], float64, squared error of keys and of values, summed.
        whole: likewise, their squares.
    """

    def __init__(self, context: PiKVInferenceContext):
        layers = list(context.layers.values())
        # A layer with a sliding window has no pages, and loses nothing.
        self._stores = {i: x.store for i, x in enumerate(layers) if isinstance(x, LayerCache)}
        kv = layers[0].spec.kv
        self.lost, self.whole = torch.zeros(
            2, len(layers), 2, kv.num_groups, dtype=torch.float64, device=kv.device
        )
        for index, store in self._stores.items():
            store.on_seal = partial(self._compare, index)
            layers[index].on_leave = partial(self._travel, index, layers[index].spec)

    def _travel(self, index: int, spec: LayerSpec, block: TokenBlock) -> None:
        """Tokens of which some are sealed later: the others, of open buffers, are few."""
        wire = spec.options.codec.wire(spec.kv)
        if any(wire):
            came = block.sent(wire, lambda rows: rows)
            for side, name in enumerate(spec.kv.heads):
                exact, packed = (
                    getattr(x, name)[:, block.slot >= 0].double() for x in (block, came)
                )
                self.lost[index, side] += (packed - exact).square().sum((1, 2))
                # Pages compare with what came.
                self.whole[index, side] += (exact.square() - packed.square()).sum((1, 2))

    def _compare(
        self, index: int, keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor
    ) -> None:
        """Pages [ng, c, S, w] that were sealed as the pages [c] of the sequences `slots` [c]."""
        restored = self._stores[index].restore(pages, slots)
        for side, (x, stored) in enumerate(zip((keys, values), restored)):
            self.lost[index, side] += (stored.double() - x.double()).square().sum((1, 2, 3))
            self.whole[index, side] += x.double().square().sum((1, 2, 3))
