"""How shards are dealt over ranks: one definition of their number, and what is refused."""

import numpy as np
import pytest
import torch

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.footprint import Footprint
from pikv_megatron.cache.placement import Placement


@pytest.mark.parametrize("fields, num_ranks, num_shards", [
    ({}, 1, 1), ({}, 3, 3), ({}, 6, 6), ({}, 8, 8),
    ({"token_shards": 512}, 4, 512), ({"token_shards": 510}, 6, 510), ({"token_shards": 9}, 3, 9),
    ({"expert_shards": 2}, 4, 4), ({"expert_shards": 8}, 2, 8), ({"expert_shards": 2}, 1, 2),
    ({"expert_shards": 4, "token_shards": 16}, 8, 16),
])
def test_shards_are_dealt_evenly(fields, num_ranks, num_shards):
    placement = Placement.resolve(PiKVConfig(hash_block=1, shard_after=0, **fields), num_ranks)
    assert placement.num_shards == num_shards
    assert placement.shards_per_rank * num_ranks == num_shards
    position = torch.arange(4 * num_shards).repeat_interleave(32)
    expert = torch.arange(32).repeat(4 * num_shards) if placement.expert_shards > 1 else None
    shards = placement.shard(position, expert)
    assert torch.equal(shards.bincount(), torch.full((num_shards,), len(shards) // num_shards))


@pytest.mark.parametrize("fields", [{}, {"token_shards": 8}, {"expert_shards": 8}])
def test_the_first_tokens_stay_at_home(fields):
    """In the shard of the home rank that has the place of their own among its owner's."""
    config = PiKVConfig(hash_block=1, num_sinks=2, shard_after=10, **fields)
    near, spread = (
        Placement.resolve(config.model_copy(update=changes), 4, rank=3)
        for changes in ({}, {"shard_after": 0})
    )
    position = torch.arange(2, 40)
    expert = position * 5 % 8 if fields.get("expert_shards") else None
    shard, right = (placement.shard(position, expert) for placement in (near, spread))
    assert (near.owner(shard[:10]) == 3).all() and torch.equal(shard[10:], right[10:])
    assert torch.equal(near.local_shard(shard), near.local_shard(right))


@pytest.mark.parametrize("shard_after", [0, 7, 30])
@pytest.mark.parametrize("num_ranks, token_shards", [(1, 4), (2, 2), (4, 8), (3, 3)])
def test_no_rank_fills_more_pages_than_foreseen(shard_after, num_ranks, token_shards):
    for first in range(2, 9):
        config = PiKVConfig(num_sinks=first, shard_after=shard_after, token_shards=token_shards,
                            hash_block=5)
        placement = Placement.resolve(config, num_ranks, rank=num_ranks - 1)
        footprint = Footprint(placement, 4, 1)
        for count in (1, 7, 8, 31, 100):
            shard = placement.shard(torch.arange(first, first + count), None)
            pages = shard.bincount(minlength=placement.num_shards) // 4
            by_rank = pages.view(-1, num_ranks).sum(0)
            assert int(by_rank.max()) <= footprint.most_pages(count)
            is_far = bool((placement.owner(shard) != placement.rank).any())
            assert footprint.is_far(count) or not is_far
            last = np.array([first + count])
            assert placement.tokens_by_shard(placement.rank, last)[0].tolist() == (
                shard.bincount(minlength=placement.num_shards).tolist()
            )
            filled = footprint.filled_pages(placement.rank, np.array([first]), last)
            assert filled.tolist() == by_rank.tolist()


@pytest.mark.parametrize("fields, num_ranks, named", [
    ({"token_shards": 4}, 3, ["expert_parallel_size 3", "token_shards (4)"]),
    ({"expert_shards": 2}, 3, ["token_shards (null", "expert_shards 2"]),
    ({"token_shards": 6, "expert_shards": 2}, 2, ["token_shards (6)", "expert_shards 2"]),
    ({"token_shards": 2, "expert_shards": 2}, 4, ["expert_parallel_size 4", "expert_shards 2"]),
    ({"token_shards": 64, "expert_shards": 2, "replicas": 2}, 2, ["replicas 2", "token_shards"]),
])
def test_what_cannot_be_dealt_is_refused_by_both_names(fields, num_ranks, named):
    with pytest.raises(ValueError) as error:
        Placement.resolve(PiKVConfig(**fields), num_ranks)
    assert all(name in str(error.value) for name in named), error.value
