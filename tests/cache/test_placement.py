"""How shards are dealt over ranks: one definition of their number, and what is refused."""

import pytest
import torch

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.placement import Placement


@pytest.mark.parametrize("fields, num_ranks, num_shards", [
    ({}, 1, 1), ({}, 3, 3), ({}, 6, 6), ({}, 8, 8),
    ({"token_shards": 512}, 4, 512), ({"token_shards": 510}, 6, 510), ({"token_shards": 9}, 3, 9),
    ({"expert_shards": 2}, 4, 4), ({"expert_shards": 8}, 2, 8), ({"expert_shards": 2}, 1, 2),
    ({"expert_shards": 4, "token_shards": 16}, 8, 16),
])
def test_shards_are_dealt_evenly(fields, num_ranks, num_shards):
    placement = Placement.resolve(PiKVConfig(hash_block=1, **fields), num_ranks)
    assert placement.num_shards == num_shards
    assert placement.shards_per_rank * num_ranks == num_shards
    position = torch.arange(4 * num_shards).repeat_interleave(32)
    expert = torch.arange(32).repeat(4 * num_shards) if placement.expert_shards > 1 else None
    shards = placement.shard(position, expert)
    assert torch.equal(shards.bincount(), torch.full((num_shards,), len(shards) // num_shards))


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
