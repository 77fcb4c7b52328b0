"""What every sketch promises."""

import pytest
import torch

from pikv_megatron.sketch.registry import SKETCHERS

KEYS = torch.randn(2, 5, 7, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SKETCHERS)
def test_pages_are_sketched_one_by_one(name):
    sketcher = SKETCHERS[name]()
    together = sketcher.sketch(KEYS)
    for page in range(KEYS.shape[1]):
        for whole, alone in zip(together, sketcher.sketch(KEYS[:, page : page + 1])):
            if isinstance(whole, torch.Tensor):
                assert whole.shape[:2] == KEYS.shape[:2]
                torch.testing.assert_close(whole[:, page : page + 1], alone)


@pytest.mark.parametrize("name", SKETCHERS)
def test_the_order_of_tokens_does_not_matter_to_a_page_sketch(name):
    sketcher = SKETCHERS[name]()
    for one, other in zip(sketcher.sketch(KEYS), sketcher.sketch(KEYS.flip(2))):
        torch.testing.assert_close(one, other)
