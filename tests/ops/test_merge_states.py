"""Merging partial attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_rms

from pikv_megatron.ops.merge_states import merge_states


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 70), st.integers(0, 99),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_parts_merge_to_the_softmax_over_all(k, n, width, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    out = torch.randn(k, n, 2, 3, width, generator=rng).to(dtype)
    lse = torch.randn(k, n, 2, 3, generator=rng) * 5
    lse[torch.rand(k, n, 2, 3, generator=rng) < 0.4] = -torch.inf
    state = merge_states(out.masked_fill(lse.unsqueeze(-1) == -torch.inf, torch.nan), lse)
    weight = torch.softmax(lse.double(), dim=0).nan_to_num(0.0).unsqueeze(-1)
    assert state.out.dtype == dtype
    right = (out.double() * weight).sum(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_rms(state.out, right) < tolerance
    torch.testing.assert_close(state.lse.double(), torch.logsumexp(lse.double(), dim=0))


def test_two_equal_parts_merge_to_their_mean():
    out = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    state = merge_states(out, torch.zeros(2, 1, 1, 1))
    assert float(state.out) == 2.0
    assert float(state.lse) == pytest.approx(0.6931472)
