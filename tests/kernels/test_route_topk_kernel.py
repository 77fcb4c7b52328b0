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
