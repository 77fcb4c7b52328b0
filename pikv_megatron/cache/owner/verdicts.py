"""What owners say of pages: which ones go, and that their homes, which list them too, are told."""

import torch

from pikv_megatron.cache.home.directory import PageDirectory
from pikv_megatron.cache.owner.layers_together import prune_across, prune_alike
from pikv_megatron.cache.owner.page_keeper import PageKeeper
from pikv_megatron.cache.step.flush_plan import FlushPlan
from pikv_megatron.parallel.dispatcher import FLUSH_OP, KVDispatcher
from pikv_megatron.parallel.packet import pack_bits, unpack_bits


class Verdicts:
    """Of one layer, on this rank.

    Args:
        keeper: of the pages that this rank owns.
        directory: of its own sequences' pages; None: none is kept.
        dispatcher: brings words to the homes.

    Attributes:
        peers: of layers, in order, that decide together, this one among them; none: it decides by
            itself.
    """

    def __init__(
        self, keeper: PageKeeper, directory: PageDirectory | None, dispatcher: KVDispatcher
    ):
        self._keeper, self._directory, self._dispatcher = keeper, directory, dispatcher
        self.peers: "list[Verdicts]" = []

    def give(self, flush: FlushPlan) -> None:
        """Merge old pages, and drop those beyond the budget."""
        slots = flush.numbers.all_slots
        drops = self._keeper.age(slots, flush.most_pages)
        if self._keeper.prunes and not self.peers:
            drops.append(self._keeper.prune(slots, flush.most_pages))
        for drop in drops:
            self._tell_homes(drop, flush)
        # What pages are worth to all layers is known behind the last of them.
        if self.peers and self is self.peers[-1]:
            keepers = [peer._keeper for peer in self.peers]
            together = prune_alike if self._keeper.sums_layers else prune_across
            for peer, drop in zip(self.peers, together(keepers, slots, flush.most_pages)):
                peer._tell_homes(drop, flush)

    def _tell_homes(self, drop: torch.Tensor, flush: FlushPlan) -> None:
        """Columns [sequences of all ranks, m] that this owner dropped, where home lists pages."""
        if self._directory is None:
            return
        route = self._dispatcher.everywhere(flush.num_sequences)
        words = self._dispatcher.give_back(route, pack_bits(drop), FLUSH_OP)
        dropped = unpack_bits(words, drop.shape[1]).transpose(0, 1)
        self._directory.apply(flush.numbers.window_slots, dropped)


def decide_together(every: list[Verdicts]) -> None:
    """Let layers, in order, decide together which pages stay."""
    keepers = [verdicts._keeper for verdicts in every]
    for verdicts, keeper in zip(every, keepers):
        verdicts.peers = every
        keeper.has_joint_pool = len({each.pool for each in keepers}) == 1
