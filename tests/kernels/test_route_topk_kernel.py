"""The Triton source of routing, on the cases of the torch version."""

import pytest
import torch
from hypothesis import given, settings
from test_route_topk import expected, route_cases


@pytest.fixture(scope="module")
def route_topk(triton_kernel):
    return triton_kernel("route_topk")


@settings(deadline=None, max_examples=40)
@given(route_cases())
def test_the_best_shards_are_visited(route_topk, device, case):
    x, penalty, k, gate = case
    gate_there = None if gate is None else gate.to(device)
    visited = route_topk(x.to(device), penalty.to(device), k, gate_there)
    assert torch.equal(visited.cpu(), expected(*case))


def test_minus_zero_equals_zero(route_topk, device):
    x = torch.tensor([[-0.0, 0.0, -1e-45]], device=device)
    assert route_topk(x, torch.zeros(3, device=device), 1).tolist() == [[True, False, False]]


def test_real_numbers(route_topk, device):
    """Of both signs and very different sizes."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 900, generator=rng) * 10.0 ** torch.randint(-38, 38, (5, 900), generator=rng)
    case = x, torch.zeros(900), 450, None
    visited = route_topk(x.to(device), torch.zeros(900, device=device), 450)
    assert torch.equal(visited.cpu(), expected(*case))
