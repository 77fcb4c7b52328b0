"""Where what is kept lies: by shard and by position.

Legend: N shards, B parts of the sequence.
"""

import torch
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.transformer.context import PiKVInferenceContext

NUM_PARTS = 32  # B


class HeldTokens:
    """Counts the tokens that this rank's shards hold in the end.

    Args:
        context: of the sequences.

    Attributes:
        by_shard: [layers, N], int64.
        by_position: [layers, B], int64.
        filled: [B], int64, tokens that were fed to the sequences, those of windows left out.
    """

    def __init__(self, context: PiKVInferenceContext):
        self._context, self._layers = context, list(context.layers.values())
        self._device = self._layers[0].spec.kv.device
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        count, device = len(self._layers), self._device
        shape = count, self._context.placement.num_shards
        self.by_shard = torch.zeros(shape, dtype=torch.int64, device=device)
        self.by_position = torch.zeros(count, NUM_PARTS, dtype=torch.int64, device=device)
        self.filled = torch.zeros(NUM_PARTS, dtype=torch.int64, device=device)

    def count_end(self, own: list, length: int) -> None:
        """The live sequences, `own` of them at home here, were fed `length` tokens each."""
        for sequence in own:
            left = torch.arange(self._context.pikv_config.num_sinks, sequence.flushed)
            self.filled += _parts(left.to(self._device), length)
        for index, layer in enumerate(self._layers):
            if isinstance(layer, LayerCache):
                self._count(index, layer, length)

    def counts(self) -> list[Tensor]:
        """By shard, by position, and tokens that could be held."""
        return [self.by_shard, self.by_position, self.filled]

    def _count(self, index: int, layer: LayerCache, length: int) -> None:
        store = layer.store
        pages = torch.cat([store.table.pages_of(slot) for slot in range(store.num_slots)])
        held = store.pool.position[pages]
        shards = store.pool.shard[pages].long().repeat_interleave(store.page_size)
        groups = torch.arange(store.ledger.padding_group, device=held.device)
        lens, position = store.buffers.lens(groups), store.buffers.tensors["position"][groups]
        is_open = torch.arange(store.page_size, device=held.device) < lens.unsqueeze(1)
        placement = store.placement
        local = groups % placement.shards_per_rank
        shard = local * placement.num_ranks + placement.rank
        every = torch.cat([held.flatten(), position[is_open]]).long()
        shards = torch.cat([shards, shard.repeat_interleave(lens)])
        self.by_position[index] += _parts(every, length)
        self.by_shard[index] += shards.bincount(minlength=placement.num_shards)


def _parts(positions: Tensor, length: int) -> Tensor:
    return (positions * NUM_PARTS // length).bincount(minlength=NUM_PARTS)[:NUM_PARTS]
