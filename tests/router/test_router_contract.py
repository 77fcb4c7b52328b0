"""What every router promises, and what each one does."""

import pytest
import torch
from directories import drawn_ask

from pikv_megatron.options import members
from pikv_megatron.router.registry import Router
from pikv_megatron.router.top_k import TopKOptions

ROUTERS = members(Router)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_sequences", [0, 3])
def test_every_sequence_visits_some_shard(name, num_sequences):
    router = ROUTERS[name]().build()
    if router is not None:
        shards = router.visit(drawn_ask(num_sequences, num_ranks=2, num_shards=4))
        assert shards.dtype == torch.bool and shards.shape == (num_sequences, 4)
        assert shards.any(dim=1).all()


def test_top_k_visits_the_shards_with_the_most_of_the_attention():
    ask = drawn_ask(3, num_ranks=2, num_shards=8)
    visited = TopKOptions(k=3).build().visit(ask)
    for row, (shards, shares) in enumerate(zip(visited, ask.page_scores)):
        by_shard = torch.zeros(8).index_add_(0, ask.directory.shard[row].flatten(), shares)
        assert int(shards.sum()) == 3
        assert by_shard[shards].min() >= by_shard[~shards].max()
