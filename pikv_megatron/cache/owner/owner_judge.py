"""Pages judged by the ranks that store them, from their keys as stored.

Keys lie with their owners, so their logits are computed there, by all ranks at once, and what
travels home is one number a page and head. That takes queries on a journey of their own, before
home can say what is to be read; where all pages lie at home, nothing travels.

Legend: n decoding rows of this home rank, R of all ranks, np query heads, G ranks, m columns of a
rank, M = G * m.
"""

from functools import cached_property

import torch

from pikv_megatron.cache.head_maps import HeadMaps
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.step.decode_part import DecodePart
from pikv_megatron.parallel.dispatcher import KVDispatcher
from pikv_megatron.relevance import PageJudge


class OwnerJudge(PageJudge):
    """Called on all ranks alike.

    Args:
        query: [n, np, w_q].
        maps: from queries to what is cached.
        part: the decoding rows.
        store: of this rank.
        dispatcher: brings queries to the owners.
        is_page: [n, M], bool.
    """

    def __init__(
        self, query: torch.Tensor, maps: HeadMaps, part: DecodePart, store: ShardStore,
        dispatcher: KVDispatcher, is_page: torch.Tensor,
    ):
        self._query, self._maps, self._part = query, maps, part
        self._store, self._dispatcher, self._is_page = store, dispatcher, is_page

    def scores(self):
        logit = self._logits
        score = logit.softmax(dim=2).mean(dim=1).masked_fill(~self._is_page, 0.0)
        return logit, score

    def bounds(self):
        """Owners attend to the same keys: there is nothing between the bounds."""
        return self._logits, self._logits

    @cached_property
    def _logits(self) -> torch.Tensor:
        return self._everywhere() if self._part.reads_far else self._here()

    def _here(self) -> torch.Tensor:
        """[n, np, M]: other ranks have no pages of these sequences."""
        query = self._maps.absorb(self._query)
        own = self._store.page_logits(query, self._part.own_reads)
        if self._dispatcher.num_ranks == 1:
            return own
        every = own.new_full((*own.shape[:2], self._dispatcher.num_ranks, own.shape[2]), -torch.inf)
        every[:, :, self._dispatcher.rank] = own
        return every.flatten(2)

    def _everywhere(self) -> torch.Tensor:
        sent = self._maps.sent(self._query)
        route = self._dispatcher.post(sent, None, self._part.counts)
        arrived, _ = self._dispatcher.wait(route, sent, None)
        own = self._store.page_logits(self._maps.arrived(arrived), self._part.all_reads)
        return self._dispatcher.give_back(route, own).permute(1, 2, 0, 3).flatten(2)
