"""Which share of the true attention was read: that over all tokens, with exact keys.

Legend: n sequences of this home rank, L tokens of each, np query heads, ng KV heads, w width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.step.step_rows import CachedSequence
from pikv_megatron.transformer.context import PiKVInferenceContext
from pikv_megatron.types import PageList

MOST_SEQUENCES = 16  # of all ranks: their exact keys are remembered
MOST_STEPS = 8  # of a batch


class AttentionMass:
    """Remembers every key of some sequences, and marks what owners read of them.

    Args:
        context: its layers are observed.

    Attributes:
        mass: [layers], float64, shares of the attention that were read, summed.
        count: what they were summed over: steps, sequences and heads.
    """

    def __init__(self, context: PiKVInferenceContext):
        self._context = context
        layers = list(context.layers.values())
        self._device = layers[0].spec.kv.device
        self._num_layers = len(layers)
        self._layers = {i: x for i, x in enumerate(layers) if isinstance(x, LayerCache)}
        self.is_probing = False
        self._keys: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Sum from zero."""
        self.mass = torch.zeros(self._num_layers, dtype=torch.float64, device=self._device)
        self.count = torch.zeros(1, dtype=torch.float64, device=self._device)

    def begin(self, own: Sequence[CachedSequence], length: int) -> None:
        """Watch sequences that are all fed alike, up to `length` tokens."""
        self._own, self._past = own, 0
        for index, layer in self._layers.items():
            kv = layer.spec.kv
            self._keys[index] = torch.zeros(
                len(own), length, kv.num_groups, kv.key_width, dtype=kv.dtype, device=kv.device
            )
            layer.on_attend = partial(self._remember, index)
        self._is_read = torch.zeros(
            self._num_layers, self._context.max_batch_size * self._context.num_ranks, length,
            dtype=torch.uint8, device=self._device,
        )

    def end(self) -> None:
        """Forget the sequences."""
        for layer in self._layers.values():
            layer.on_attend = None
        self._keys.clear()

    def probe(self) -> None:
        """Watch what the next step reads."""
        self.is_probing = True
        self._is_read.zero_()
        self._flushed = torch.tensor([sequence.flushed for sequence in self._own]).long()

    def measure(self) -> None:
        """Sum up what the step read, on all ranks."""
        self.is_probing = False
        if self._context.ep_group is not None:
            dist.all_reduce(self._is_read, op=dist.ReduceOp.MAX, group=self._context.ep_group)
        position = torch.arange(self._past, device=self._device)
        near = position < self._context.pikv_config.num_sinks
        near = near | (position >= self._flushed.to(self._device).unsqueeze(1))
        slots = torch.tensor([sequence.slot for sequence in self._own]).long()
        for index, layer in self._layers.items():
            is_read = near | (self._is_read[index, slots, : self._past] > 0)
            keys, query = self._keys[index][:, : self._past].float(), self._queries[index].float()
            groups = query.unflatten(1, (keys.shape[2], -1))
            logits = torch.einsum("ngqw,nlgw->ngql", groups, keys) * layer.spec.softmax_scale
            shares = logits.softmax(-1) * is_read[:, None, None]
            self.mass[index] += shares.sum(-1).double().mean((1, 2)).sum()
        self.count += len(self._own)

    def mark(self, index: int, reads: OwnerReads, sealed: PageList, opened: PageList) -> None:
        """Owners read pages and open buffers of a layer; see `PageCounter.on_read`."""
        if not self.is_probing:
            return
        store = self._layers[index].store
        lists = (sealed, store.pool.position), (opened, store.buffers.tensors["position"])
        for listed, positions in lists:
            place = torch.arange(positions.shape[1], device=positions.device)
            is_read = place < listed.lens.unsqueeze(2)
            slots = reads.slots.view(-1, 1, 1).expand_as(is_read)[is_read]
            self._is_read[index, slots, positions[listed.table][is_read].long()] = 1

    def _remember(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """A step's query [t, np, w] and key [t, ng, w]."""
        if index == min(self._layers):
            self._place_tokens()
        if len(self._rows):
            self._keys[index][self._rows, self._positions] = key
        if self.is_probing:
            self._queries[index] = query

    def _place_tokens(self) -> None:
        """Say once for all layers of a step whose its tokens are, and where they stand."""
        plan, number = self._context.plan, {s.slot: i for i, s in enumerate(self._own)}
        rows = [number[row.sequence.slot] for row in plan.rows for _ in range(row.count)]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self._positions = plan.tokens.positions[: len(rows)]
        self._past = max((row.end for row in plan.rows), default=0)
