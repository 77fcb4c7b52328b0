"""The cache of a rank, made on torch's meta device: the very objects, and no memory.

So the count is not a formula beside the cache that could part from it: what a running engine
allocates when it takes its sequences is what is allocated here, tensor by tensor.
"""

from collections import Counter
from typing import NamedTuple

from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.owner.held_shares import HeldShares
from pikv_megatron.cache.sliding_cache import SlidingCache
from pikv_megatron.layer_spec import LayerSpec
from pikv_megatron.planner.target import Target
from pikv_megatron.transformer.context import PiKVInferenceContext


class PlannedGroup(NamedTuple):
    """Stands for a process group: its size, and the rank that is planned for."""

    num_ranks: int
    number: int = 0

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.number


class PlannedLayer(NamedTuple):
    """A layer, and how many are like it."""

    cache: LayerCache | SlidingCache
    count: int

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Of one of them."""
        parts = self.cache.parts().items()
        return {name: sum(t.nbytes for t in tensors) for name, tensors in parts}


class PlannedCache:
    """The first rank's cache once all sequences of a target were taken; no other has more.

    Args:
        target: what is planned for.

    Attributes:
        layers: those that differ.
        placement: of tokens.
    """

    def __init__(self, target: Target):
        self._target = target
        counts = Counter(map(_kind, target.specs))
        distinct = {_kind(spec): spec for spec in target.specs}
        # What the context would check itself, all ranks together.
        pikv = target.pikv.model_copy(update={"memory_limit": None})
        group = PlannedGroup(target.num_ranks) if target.num_ranks > 1 else None
        context = PiKVInferenceContext(
            target.num_own, target.max_sequence_length, pikv, list(distinct.values()), group
        )
        homes = [number % target.num_ranks for number in range(target.batch)]
        context.reserve([(context.start(home), target.context) for home in homes])
        self.placement = context.placement
        self.footprint = context.footprint
        self.layers = [
            PlannedLayer(context.layers[spec.number], counts[kind])
            for kind, spec in distinct.items()
        ]

    def bytes_by_part(self) -> dict[str, int]:
        """What the rank's cache takes at most while it decodes, by what it is for."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            for part, num_bytes in layer.bytes_by_part.items():
                total[part] += layer.count * num_bytes
        total["statistics"] += self.waiting_bytes()
        return {part: num_bytes for part, num_bytes in total.items() if num_bytes}

    def lower_bytes(self) -> tuple[int, int]:
        """What pages take in the host's memory and in files, besides."""
        host = file = 0
        for layer in self.layers:
            if isinstance(layer.cache, LayerCache):
                in_host, in_file = layer.cache.store.pool.lower_bytes
                host, file = host + layer.count * in_host, file + layer.count * in_file
        return host, file

    def num_columns(self, cache: LayerCache) -> int:
        """Columns of a sequence's pages on a rank in the last decode step."""
        most = self.footprint.most_pages(self._target.last_in_shards)
        return cache.store.keeper.num_columns(most)

    def num_read(self, cache: LayerCache) -> int:
        """Columns that a selector names of a sequence's pages on all ranks; without one, all."""
        columns = self.num_columns(cache) * self._target.num_ranks
        return columns if cache.selector is None else cache.selector.num_columns(columns)

    def waiting_bytes(self) -> int:
        """Of `bytes_by_part`, what a decode step leaves for the next one."""
        return sum(layer.count * self._held_bytes(layer.cache) for layer in self.layers)

    def _held_bytes(self, cache: LayerCache | SlidingCache) -> int:
        """What the last step leaves for the next where one rank has the whole of its attention."""
        is_alone = self._target.num_ranks == 1 and isinstance(cache, LayerCache)
        if not is_alone or cache.store.held is None or not self._target.last_in_shards:
            return 0
        return HeldShares.whole_bytes(
            self._target.num_own, cache.spec.num_heads, self.num_read(cache)
        )


def _kind(spec: LayerSpec) -> tuple:
    """What sizes a layer's cache; layers that decide together may share their pages."""
    policy = spec.options.retention.build(spec.fitted)
    apart = spec.number if spec.options.budget.joins_layers else None
    return *spec.chosen, policy is not None and policy.keeps_none, apart
