"""What every router promises."""

import pytest
import torch
from directories import drawn_directory

from pikv_megatron.router.registry import ROUTERS


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("has_directory", [False, True])
def test_every_sequence_visits_some_shard(name, has_directory):
    query = torch.randn(3, 2, 4, 8)
    directory = drawn_directory(num_sequences=3, num_ranks=2, num_shards=4)
    shards = ROUTERS[name]().visit(query, directory if has_directory else None)
    if shards is not None:
        assert shards.dtype == torch.bool and shards.shape == (3, 4)
        assert shards.any(dim=1).all()
