"""The Triton source of appending, on the cases of the torch version."""

import pytest
import torch
from hypothesis import given, settings
from huge_pools import huge_pool, without_copies
from test_append_kv import append_cases, check


@pytest.fixture(scope="module")
def append_kv(triton_kernel):
    return triton_kernel("append_kv")


@settings(deadline=None, max_examples=30)
@given(append_cases())
def test_every_token_lands_in_its_place(append_kv, device, case):
    # The interpreter rounds to bfloat16 downwards.
    check(append_kv, case, device, rtol=2.0**-7)


def test_pools_of_more_than_two_billion_numbers(append_kv, device, monkeypatch):
    keys, values = torch.randn(2, 2, 2, 16, device=device).half()
    pools = [huge_pool((2, 4, 4, 16), torch.float16, device) for _ in range(2)]
    page = torch.tensor([2, 0], device=device)
    offset = torch.tensor([3, 2], device=device)
    without_copies(monkeypatch)
    append_kv(keys, values, *pools, page, offset)
    for pool, x in zip(pools, (keys, values)):
        assert torch.equal(pool[:, page, offset], x)
