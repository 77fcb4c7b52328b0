"""The Triton source of merging against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_rms

from pikv_megatron.ops.merge_states import merge_states as torch_merge


@pytest.fixture(scope="module")
def merge(triton_kernel):
    return triton_kernel("merge_states")


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(1, 130), st.integers(0, 99),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_it_merges_as_torch_does(merge, device, k, n, width, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    out = torch.randn(k, n, 2, 3, width, generator=rng).to(device, dtype)
    lse = (torch.randn(k, n, 2, 3, generator=rng) * 30).to(device)
    lse[(torch.rand(k, n, 2, 3, generator=rng) < 0.4).to(device)] = -torch.inf
    out.masked_fill_(lse.unsqueeze(-1) == -torch.inf, torch.nan)
    ours, total = merge(out, lse)
    right = torch_merge(out, lse)
    assert ours.dtype == dtype and total.dtype == torch.float32
    # A float32 log-sum-exp of 70 has steps of 8e-6.
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_rms(ours, right.out) < tolerance
    torch.testing.assert_close(total, right.lse)
