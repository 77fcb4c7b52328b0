"""What a rank hands to the cache's collectives in a decode step, as `inference.traffic` counts it.

Legend: n sequences of the home rank, R of all ranks, G ranks, N shards, np query heads, w_k and w_v
widths of keys and values.
"""

from typing import NamedTuple

from pikv_megatron.cache.home.query_header import HeaderLayout
from pikv_megatron.cache.layer_cache import LayerCache
from pikv_megatron.cache.partial_states import num_words
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.target import Target

WORD = 4  # bytes of a float32 or int32
TOKEN_HEADER = 32  # slot, shard, position and earlier shards of a token that leaves a window
COUNT = 8  # of rows for a rank, where splits are not known beforehand
CHOSEN_TOKEN = 16  # a token and its log-probability, for all ranks


class Traffic(NamedTuple):
    """Bytes a step and rank; the share that a rank hands to itself is in them.

    Attributes:
        query: queries and what owners are told with them.
        combine: parts of the attention, on their way home.
        flush: tokens that leave windows, and which pages were dropped; the mean over steps.
        tokens: that were chosen.
    """

    query: float
    combine: float
    flush: float
    tokens: float

    @property
    def total(self) -> float:
        return sum(self)


def decode_traffic(target: Target, cache: PlannedCache) -> Traffic:
    """Of the first rank, at the end of the context; with a router at most so much."""
    if target.num_ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    query = combine = flush = 0.0
    if cache.footprint.is_far(target.last_in_shards):
        for layer in cache.layers:
            if isinstance(layer.cache, LayerCache):
                parts = _LayerTraffic(target, cache, layer.cache)
                query += layer.count * parts.query()
                combine += layer.count * parts.combine()
                flush += layer.count * parts.flush()
    rows = target.num_own
    if any(spec.options.retention.tiers is not None for spec in target.specs):
        # What every sequence lost, in the place of tokens.
        rows += -(-target.batch // 2)
    return Traffic(query, combine, flush, float(rows * CHOSEN_TOKEN))


def visited_ranks(target: Target, layer: LayerCache) -> int:
    """Ranks that a query visits, at most."""
    return min(target.num_ranks, getattr(layer.spec.options.router, "k", target.num_ranks))


class _LayerTraffic:
    """Of one layer."""

    def __init__(self, target: Target, cache: PlannedCache, layer: LayerCache):
        self._target, self._cache, self._layer = target, cache, layer
        self._gathers = target.pikv.dispatcher == "allgather"
        self._visited = visited_ranks(target, layer)
        self._is_routed = layer.router is not None
        self._asks_owners = layer.directory is not None and layer.directory.asks_owners

    def query(self) -> float:
        spec, ranks = self._layer.spec, self._target.num_ranks
        width, _ = spec.sent_widths or (spec.kv.key_width, spec.kv.value_width)
        query = spec.num_heads * width * spec.kv.dtype.itemsize
        told = WORD * self._header_words()
        asked = query if self._asks_owners else 0
        if self._gathers:
            return self._target.num_own * (query + ranks * told + asked)
        counts = COUNT * ranks if self._is_routed else 0
        visited = self._visited * (query + told) + ranks * asked
        return self._target.num_own * visited + counts

    def combine(self) -> float:
        spec, target = self._layer.spec, self._target
        _, width = spec.sent_widths or (spec.kv.key_width, spec.kv.value_width)
        words = num_words(width, spec.kv.dtype)
        if self._is_routed and self._layer.router.learns:
            words += self._cache.placement.shards_per_rank
        columns = self._cache.num_columns(self._layer) if self._asks_owners else 0
        if self._gathers:
            rows = asked = target.num_ranks * target.num_own
        else:
            rows, asked = target.batch * self._visited / target.num_ranks, target.batch
        return (rows * words + asked * columns) * spec.num_heads * WORD

    def flush(self) -> float:
        target, store = self._target, self._layer.store
        pikv, ranks = target.pikv, target.num_ranks
        kv = self._layer.spec.kv
        token = TOKEN_HEADER + self._layer.spec.options.codec.wire(kv).token_bytes(kv)
        tokens = float(target.num_own * token * self._cache.footprint.copies)
        per_flush = 0 if self._gathers else COUNT * ranks
        if store.keeper.drops and self._layer.directory is not None:
            most = self._cache.footprint.most_pages(target.last_in_shards)
            rows = ranks * target.num_own if self._gathers else target.batch
            per_flush += store.keeper.num_verdicts * rows * WORD * -(-most // 32)
        return tokens + per_flush / pikv.flush_interval

    def _header_words(self) -> int:
        layer, columns, drawn, ahead = self._layer, 0, 0, 0
        tiers = layer.spec.options.retention.tiers
        if layer.selector is not None:
            # Of one rank, what is chosen of all ranks' at most.
            most = self._cache.num_columns(layer)
            columns = min(self._cache.num_read(layer), most)
            drawn = min(layer.selector.num_drawn(most * self._target.num_ranks), most)
            ahead = 0 if tiers is None else min(tiers.ahead, most)
        return HeaderLayout(
            self._cache.placement.num_shards if self._is_routed else 0, columns,
            0 if layer.store.held is None else layer.spec.num_heads, drawn, ahead,
        ).num_words
