"""The way of tokens that leave their windows: to the owners of their shards, and into pages."""

from pikv_megatron.cache.home.directory import PageDirectory
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.step.flush_plan import FlushPlan
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.codec.wire import Wire
from pikv_megatron.parallel.dispatcher import KVDispatcher


class Delivery:
    """Of one layer, on this rank.

    Args:
        store: the shards that this rank owns.
        directory: of its own sequences' pages; None: none is kept.
        dispatcher: sends tokens to other ranks.
        placement: the owner of a shard.
        wire: how tokens travel.
    """

    def __init__(
        self, store: ShardStore, directory: PageDirectory | None, dispatcher: KVDispatcher,
        placement: Placement, wire: Wire,
    ):
        self._store, self._directory = store, directory
        self._dispatcher, self._placement, self._wire = dispatcher, placement, wire

    def bring(self, block: TokenBlock, flush: FlushPlan, copies: int) -> None:
        """Note this rank's tokens, `copies` rows each, and store those that come from all ranks.
        """
        if self._directory is not None:
            noted = flush.once("noted", lambda: self._directory.admit(block, flush.num_noted))
            self._directory.note(block, noted)
        if flush.goes_far:
            owner = self._placement.owner(block.shard)
            counts = [count * copies for count in flush.counts]
            block = block.sent(
                self._wire, lambda rows: self._dispatcher.send(rows, owner, counts)
            )
        elif any(self._wire):
            # Rounded as on the way, so that a cache is the same over any number of ranks.
            block = block.sent(self._wire, lambda rows: rows)
        stored = flush.once("stored", lambda: self._store.admit(block, flush.num_stored))
        self._store.insert(block, stored)
