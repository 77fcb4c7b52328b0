"""A budget of bytes is spent with the least error."""

from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pikv_megatron.calibration.allocation import Choice, allocate

CHOICES = st.builds(Choice, st.integers(1, 9), st.floats(0, 9), st.just({}))


@settings(deadline=None)
@given(st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4),
       st.integers(4, 40))
def test_no_other_choice_within_the_budget_is_better(menus, budget):
    sums = [
        sum(choice.error for choice in chosen) for chosen in product(*menus)
        if sum(choice.num_bytes for choice in chosen) <= budget
    ]
    if not sums:
        with pytest.raises(ValueError, match="the smallest codecs need"):
            allocate(menus, budget)
        return
    chosen = allocate(menus, budget)
    assert sum(choice.num_bytes for choice in chosen) <= budget
    assert all(choice in menu for choice, menu in zip(chosen, menus, strict=True))
    assert sum(choice.error for choice in chosen) == pytest.approx(min(sums))


def test_the_example_of_the_docstring():
    menus = [[Choice(4, 0.0, {}), Choice(2, 1.0, {})], [Choice(4, 0.0, {}), Choice(2, 5.0, {})]]
    assert [choice.num_bytes for choice in allocate(menus, 6)] == [2, 4]
