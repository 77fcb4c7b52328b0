"""Which shards a query visits."""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import Directory


class KVRouter(ABC):
    """Chooses the shards that a step's queries visit (Megatron's MoE router chooses experts)."""

    @abstractmethod
    def visit(self, query: torch.Tensor, directory: Directory | None) -> torch.Tensor | None:
        """Choose shards for each sequence.

        Args:
            query: [n, sq, np, hn], after RoPE.
            directory: of the same n sequences; None where no sketch is kept.

        Returns:
            [n, num_shards], bool, at least one a sequence; None for every shard.
        """
