"""What every retention policy promises."""

import pytest
import torch

from pikv_megatron.scheduler.registry import RETENTION_POLICIES
from pikv_megatron.types import PageStats


@pytest.mark.parametrize("name", RETENTION_POLICIES)
def test_it_says_of_every_column_whether_its_page_stays(name):
    is_page = torch.tensor([[True, True, False], [False, False, False]])
    stats = PageStats(
        table=torch.tensor([[1, 0, 0], [0, 0, 0]]), is_page=is_page,
        position=torch.arange(8, dtype=torch.int32).view(2, 4),
        shard=torch.tensor([0, 1], dtype=torch.int32),
    )
    keep = RETENTION_POLICIES[name]().keep(stats)
    if keep is not None:
        assert keep.dtype == torch.bool and keep.shape == is_page.shape
