"""Exactly k shards a row, the best, the lower one among equals."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pikv_megatron.ops.route_topk import route_topk


@st.composite
def route_cases(draw):
    """Small integers, so that ties abound and sums are exact, with NaN and infinities."""
    n = draw(st.integers(0, 9))
    num_shards = draw(st.integers(1, 64) | st.sampled_from([65, 128, 300, 777, 1024]))
    has_gate, has_rows = draw(st.booleans()), draw(st.booleans())
    width = draw(st.sampled_from([16, 63, 256])) if has_gate else num_shards
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=rng).float()

    x = integers(n, width)
    x[torch.rand(x.shape, generator=rng) < (0.002 if has_gate else 0.2)] = torch.nan
    if not has_gate:
        x[torch.rand(x.shape, generator=rng) < 0.2] = -torch.inf
    penalty = integers(n, num_shards) if has_rows else integers(num_shards)
    gate = integers(num_shards, width) if has_gate else None
    return x, penalty, draw(st.integers(1, 70) | st.sampled_from([300, 1024])), gate


def expected(x, penalty, k, gate) -> torch.Tensor:
    """Row by row, by sorting tuples."""
    logits = (x.double() if gate is None else x.double() @ gate.double().T) - penalty.double()
    visited = torch.zeros(logits.shape, dtype=torch.bool)
    for row, values in enumerate(logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).tolist()):
        order = sorted(range(len(values)), key=lambda shard: (-values[shard], shard))
        visited[row, order[:k]] = True
    return visited


@settings(deadline=None, max_examples=100)
@given(route_cases())
def test_the_best_shards_are_visited(case):
    assert torch.equal(route_topk(*case), expected(*case))


def test_the_example_of_the_docstring():
    visited = route_topk(torch.tensor([[1.0, 3, 3, 2]]), torch.tensor([0.0, 0, 1, 0]), 2)
    assert visited.tolist() == [[False, True, True, False]]


def test_a_penalty_that_leaves_minus_zero_leaves_a_tie():
    visited = route_topk(torch.tensor([[-0.0, 1, 0]]), torch.tensor([0.0, 1, 0]), 1)
    assert visited.tolist() == [[True, False, False]]


@pytest.mark.parametrize("k, num_shards, message", [(0, 8, "k is 0"), (1, 1025, "1025 shards")])
def test_what_cannot_be_ranked_is_refused(k, num_shards, message):
    with pytest.raises(ValueError, match=message):
        route_topk(torch.zeros(1, num_shards), torch.zeros(num_shards), k)
