"""What every sketch promises."""

import pytest
import torch

from pikv_megatron.sketch.registry import SKETCHERS

KEYS = torch.randn(2, 5, 7, 8, generator=torch.Generator().manual_seed(0))


def sketched(name: str, keys: torch.Tensor, page: list[int]) -> list[torch.Tensor]:
    """Tensors [ng, 8, ...] with the sketches of pages [ng, c, S, hn] at their places."""
    sketcher = SKETCHERS[name]()
    sketch = sketcher.allocate(2, 8, 7, 8, torch.float32, torch.device("cpu"))
    sketcher.write(keys, sketch, torch.tensor(page))
    return [field for field in sketch if isinstance(field, torch.Tensor)]


@pytest.mark.parametrize("name", SKETCHERS)
def test_pages_are_sketched_one_by_one_into_their_places(name):
    page = [6, 0, 3, 2, 5]
    together = sketched(name, KEYS, page)
    for index, place in enumerate(page):
        alone = sketched(name, KEYS[:, index : index + 1], [1])
        for whole, one in zip(together, alone):
            torch.testing.assert_close(whole[:, place], one[:, 1])
    for whole in together:
        assert whole.shape[:2] == (2, 8) and not whole[:, 1].any()


@pytest.mark.parametrize("name", SKETCHERS)
def test_the_order_of_tokens_does_not_matter_to_a_page_sketch(name):
    page = [*range(5)]
    for one, other in zip(sketched(name, KEYS, page), sketched(name, KEYS.flip(2), page)):
        torch.testing.assert_close(one, other)
