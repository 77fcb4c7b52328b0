"""Which pages of the visited shards a query reads."""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import Directory


class PageSelector(ABC):
    """Chooses pages by what the home rank remembers of them: no collective is needed."""

    @abstractmethod
    def select(
        self, query: torch.Tensor, directory: Directory | None, shards: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Choose pages for each sequence.

        Args:
            query: [n, sq, np, hn], after RoPE.
            directory: of the same n sequences; None where no sketch is kept.
            shards: [n, num_shards], bool, the visited shards; None for every one.

        Returns:
            [n, G, m], bool, in the directory's columns; None for every page.
        """
