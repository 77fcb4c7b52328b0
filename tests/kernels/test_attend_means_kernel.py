"""The Triton source of the tail against float64 and torch."""

import pytest
import torch
from hypothesis import given, settings
from mean_cases import MeanCase, expected_means, mean_case, mean_cases
from oracle import relative_rms

from pikv_megatron.ops.attend_means import attend_means as torch_means


@pytest.fixture(scope="module")
def attend_means(triton_kernel):
    return triton_kernel("attend_means")


def check(attend_means, case: MeanCase, device) -> None:
    out, lse = attend_means(*(x.to(device) for x in case))
    assert out.dtype == lse.dtype == torch.float32
    for right_out, right_lse in (expected_means(case), torch_means(*case)):
        assert out.shape == right_out.shape and lse.shape == right_lse.shape
        assert relative_rms(out.cpu(), right_out) < 3e-6
        torch.testing.assert_close(lse.cpu().double(), right_lse.double(), atol=1e-5, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(mean_cases(max_columns=50))
def test_pages_of_the_tail_count_as_their_means(attend_means, device, case):
    check(attend_means, case, device)


@pytest.mark.parametrize("tail_share", [0.002, 0.9])
def test_hundreds_of_pages_in_several_parts(attend_means, device, tail_share):
    check(attend_means, mean_case(2, 700, 2, 4, 80, torch.bfloat16, False, tail_share, 3), device)
