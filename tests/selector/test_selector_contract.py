"""What every selector promises."""

import pytest
import torch
from directories import drawn_directory

from pikv_megatron.selector.registry import SELECTORS


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("is_routed", [False, True])
def test_pages_are_chosen_in_the_directorys_columns(name, is_routed):
    query = torch.randn(3, 1, 4, 8)
    directory = drawn_directory(num_sequences=3, num_ranks=2, num_shards=4)
    shards = torch.rand(3, 4) > 0.5 if is_routed else None
    pages = SELECTORS[name]().select(query, directory, shards)
    if pages is not None:
        assert pages.dtype == torch.bool and pages.shape == directory.is_page.shape
        assert not (pages & ~directory.is_page).any()
