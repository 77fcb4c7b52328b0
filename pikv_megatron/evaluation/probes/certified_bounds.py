"""What certified layers can have left out."""

from functools import partial

import torch
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.transformer.context import PiKVInferenceContext


class CertifiedBounds:
    """Listens to the layers whose selector certifies.

    Args:
        context: its layers are observed from now on.

    Attributes:
        most: [layers], float64, the largest share of any query's attention, in any head, that may
            not have been read; 0 where all was read, or nothing is certified.
        is_certified: some layer is.
    """

    def __init__(self, context: PiKVInferenceContext):
        layers = list(context.layers.values())
        self.is_certified = False
        self.most = torch.zeros(
            len(layers), dtype=torch.float64, device=layers[0].spec.kv.device
        )
        for index, layer in enumerate(layers):
            if isinstance(layer, LayerCache) and layer.selector and layer.selector.certifies:
                layer.on_bound = partial(self._note, index)
                self.is_certified = True

    def _note(self, index: int, bounds: Tensor) -> None:
        """Of a step's queries and heads, [n, np]."""
        if bounds.numel():
            self.most[index] = torch.maximum(self.most[index], bounds.max())
