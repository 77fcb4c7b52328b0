"""What the tokens of a sequence that left its window take on the ranks.

The first ones are near, on the home rank, and the others far, spread over all ranks.
"""

from typing import NamedTuple

import numpy as np

from pikv_megatron.cache.placement import Placement


class Footprint(NamedTuple):
    """Counts pages by the number of a sequence's tokens in shards.

    Attributes:
        placement: of its tokens.
        page_size: S.
        copies: shards that store each token.
    """

    placement: Placement
    page_size: int
    copies: int

    def is_far(self, num_tokens: int) -> bool:
        """Whether other ranks than the home rank have some of them."""
        return self.placement.num_ranks > 1 and num_tokens > self.placement.shard_after

    def most_pages(self, num_tokens: int) -> int:
        """Pages that they can fill on one rank."""
        placement = self.placement
        if placement.expert_shards > 1:
            # The experts of one rank may have been chosen for every token.
            return self.copies * num_tokens // self.page_size
        near, far = self._split(num_tokens)
        period = placement.token_shards * placement.hash_block
        in_shard = min(near, -(-near // period) * placement.hash_block * placement.num_ranks)
        in_shard += min(far, -(-far // period) * placement.hash_block)
        return placement.shards_per_rank * (in_shard // self.page_size)

    def enough_pages(self, num_tokens: int, at_home: bool) -> int:
        """Pages for them on the home rank or on another, if they are spread evenly."""
        return self._pages(num_tokens, at_home, rounds_up=True)

    def full_pages(self, num_tokens: int, at_home: bool) -> int:
        """Pages that they then fill at least."""
        return self._pages(num_tokens, at_home, rounds_up=False)

    def filled_pages(self, home: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """[G]: pages on each rank that the tokens [first, last) [r] of a home rank's sequences
        fill, where experts have no say."""
        before, after = (
            self.placement.tokens_by_shard(home, ends) // self.page_size for ends in (first, last)
        )
        by_shard = (after - before).sum(axis=0)
        return by_shard.reshape(-1, self.placement.num_ranks).sum(axis=0)

    def _pages(self, num_tokens: int, at_home: bool, rounds_up: bool) -> int:
        placement, total = self.placement, 0
        near, far = self._split(num_tokens)
        parts = [(far, placement.num_shards)]
        if at_home:
            parts.append((near, placement.shards_per_rank))
        for tokens, num_shards in parts:
            per_page = self.page_size * num_shards
            pages = tokens * self.copies + (per_page - 1 if rounds_up else 0)
            total += pages // per_page * placement.shards_per_rank
        return total

    def _split(self, num_tokens: int) -> tuple[int, int]:
        """Near and far ones; on one rank, far is as near."""
        num_tokens = max(0, num_tokens)
        is_split = self.placement.num_ranks > 1
        near = min(num_tokens, self.placement.shard_after) if is_split else 0
        return near, num_tokens - near
