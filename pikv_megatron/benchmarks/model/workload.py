"""What every contestant decodes: the same cached tokens and the same new ones.

A real prefill of a long context costs time that grows with its square, so the caches are filled
with random keys and values. That they were filled alike shows in the logits, which are compared.

Legend: L tokens of the longest sequence, n sequences of this rank, ng KV heads, hn head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.dense_context import rotate

# Large enough for attention to prefer some tokens: over a flat one the logits would tell little.
KEY_SCALE = 6.0


@dataclass(frozen=True)
class Workload:
    """Sequences, dealt over the expert-parallel ranks as `generate` does.

    Attributes:
        lengths: tokens of every sequence on all ranks that are cached before the first step.
        capacity: tokens that a sequence can have.
        num_ranks: expert-parallel ranks.
        rank: this one.
        seed: of keys, values and tokens.
    """

    lengths: tuple[int, ...]
    capacity: int
    num_ranks: int
    rank: int
    seed: int

    @property
    def context_len(self) -> int:
        """L, the longest sequence's."""
        return max(self.lengths)

    @property
    def batch_size(self) -> int:
        """Sequences on all ranks."""
        return len(self.lengths)

    @property
    def own(self) -> range:
        """Sequences of this rank."""
        return self._of(self.rank)

    @property
    def counts_by_rank(self) -> list[int]:
        """Sequences of each rank."""
        return [len(self._of(rank)) for rank in range(self.num_ranks)]

    def _of(self, rank: int) -> range:
        return range(rank, self.batch_size, self.num_ranks)

    def tokens(self, num_steps: int, vocab_size: int) -> torch.Tensor:
        """[num_steps, batch_size], int64, what every sequence is fed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (num_steps, self.batch_size), generator=generator)


class LayerKV(NamedTuple):
    """Cached tokens of one layer, [L, n, ng, hn], of which a shorter sequence takes the first.

    Attributes:
        raw_keys: before RoPE, as a stock cache holds them.
        keys: after RoPE.
        values: as computed.
    """

    raw_keys: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@torch.no_grad()
def random_kv(model: GPTModel, workload: Workload) -> list[LayerKV]:
    """Keys and values of every layer for this rank's sequences, rotated as `model` does."""
    table = model.rotary_pos_emb(workload.context_len)
    table = table[0] if isinstance(table, tuple) else table  # YaRN's comes with a factor
    layers = range(model.config.num_layers)
    return [_layer_kv(model, workload, layer, table) for layer in layers]


def _layer_kv(model: GPTModel, workload: Workload, layer: int, table: torch.Tensor) -> LayerKV:
    config, parameter = model.config, next(model.parameters())
    shape = (2, workload.context_len, config.num_query_groups, config.kv_channels)
    drawn = torch.empty(len(workload.own), *shape)
    for row, sequence in enumerate(workload.own):
        seed = (workload.seed * workload.batch_size + sequence) * config.num_layers + layer
        drawn[row].normal_(generator=torch.Generator().manual_seed(seed))
    keys, values = drawn.to(parameter).permute(1, 2, 0, 3, 4)
    keys = keys * KEY_SCALE
    return LayerKV(keys, rotate(keys, table, config, model.pg_collection.cp), values)
