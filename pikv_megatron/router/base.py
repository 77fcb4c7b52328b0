"""Which shards a query visits."""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.options import Options
from pikv_megatron.relevance import Ask


class KVRouter(ABC):
    """Chooses the shards that a step's queries visit (Megatron's MoE router chooses experts)."""

    @abstractmethod
    def visit(self, ask: Ask) -> torch.Tensor:
        """[n, N], bool: the shards that each sequence visits, at least one."""


class RouterOptions(Options):
    """Parameters of a router."""

    @abstractmethod
    def build(self) -> KVRouter | None:
        """The router of a layer; None visits every shard."""
