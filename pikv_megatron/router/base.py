"""Which shards a query visits."""

from abc import ABC, abstractmethod

import torch


class KVRouter(ABC):
    """Chooses the shards that a step's queries visit (Megatron's MoE router chooses experts)."""

    @abstractmethod
    def visit(self, query: torch.Tensor) -> torch.Tensor | None:
        """Choose for query [n, sq, np, hn]: [n, num_shards] bool, or None for every shard."""
