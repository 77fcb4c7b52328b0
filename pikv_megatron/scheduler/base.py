"""Which sealed pages an owner keeps (paper, section 3.4)."""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import PageStats


class RetentionPolicy(ABC):
    """Looks at the pages of every sequence when some were sealed, and says which ones stay."""

    @abstractmethod
    def keep(self, stats: PageStats) -> torch.Tensor | None:
        """[slots, m], bool, the pages that stay; None for every page."""
