"""One thing that is fitted to a layer.

Whatever is kept until the text has ended is a sum over windows: so it can be added up over ranks,
written down, and gone on with.
"""

from abc import ABC, abstractmethod
from typing import Mapping

import torch
from torch import Tensor

from pikv_megatron.calibration.window import LayerWindow


class LayerFit(ABC):
    """Of one layer.

    Args:
        attention: Megatron's module, a `CachedAttention`.
        num_windows: that there are, of all ranks.
    """

    def __init__(self, attention: torch.nn.Module, num_windows: int):
        self._attention = attention
        self._num_windows = num_windows

    @abstractmethod
    def of(self, window: LayerWindow) -> Mapping[str, Tensor]:
        """What a window adds to each sum, by name; the names and shapes are always the same. Empty:
        nothing can be fitted to such a layer."""

    @abstractmethod
    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the sums over all windows come to, by its name in the file."""
