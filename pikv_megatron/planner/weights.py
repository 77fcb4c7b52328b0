"""What a rank's weights take, from the names and shapes of a model's parameters alone."""

import math
from dataclasses import dataclass

import torch

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.name_table import Slot, name_table


@dataclass(frozen=True)
class Weights:
    """Bytes of the parameters of a whole model.

    Attributes:
        shared: what every rank has.
        experts: what the ranks of an expert-parallel group share out.
        embedding: of `shared`, the table of which a step reads the rows of its tokens only.
        num_experts: E, of a layer.
        topk: experts that a token chooses.
    """

    shared: int
    experts: int
    embedding: int
    num_experts: int
    topk: int

    @classmethod
    def of(cls, architecture: Architecture, dtype: torch.dtype) -> "Weights":
        """Of a model in a type; biases by which experts are chosen are float32 in all of them.

        Raises:
            ValueError: the architecture has parameters without names.
        """
        shared = experts = 0
        table = name_table(architecture)
        for name, slot in table.items():
            width = 4 if name.endswith("expert_bias") else dtype.itemsize
            if "local_experts" in name:
                experts += width * _numel(slot)
            else:
                shared += width * _numel(slot)
        embedding = dtype.itemsize * _numel(table["embedding.word_embeddings.weight"])
        is_read = architecture.tie_embeddings  # as the output layer
        return cls(
            shared, experts, 0 if is_read else embedding, architecture.num_experts,
            architecture.moe_router_topk,
        )

    def of_rank(self, num_ranks: int) -> int:
        """Bytes that a rank holds."""
        return self.shared + self.experts // num_ranks

    def read(self, num_ranks: int, num_tokens: int) -> float:
        """Bytes that a rank reads in a step of so many tokens of all ranks, if experts are chosen
        evenly: an expert is read unless no token chose it."""
        is_hit = 1 - (1 - self.topk / self.num_experts) ** num_tokens
        return self.shared - self.embedding + self.experts / num_ranks * is_hit

    def multiplied(self, num_ranks: int, num_tokens: int) -> float:
        """Bytes of the weights that a rank's tokens are multiplied with, each as often as it is."""
        own = -(-num_tokens // num_ranks)
        chosen = self.experts * self.topk / self.num_experts
        return own * (self.shared - self.embedding) + num_tokens / num_ranks * chosen


def _numel(slot: Slot) -> int:
    return sum(math.prod(source.shape) for source in slot.sources)
