"""The tail of a selection against float64."""

import pytest
import torch
from hypothesis import given, settings
from mean_cases import MeanCase, expected_means, mean_case, mean_cases
from oracle import relative_rms

from pikv_megatron.ops.attend_means import attend_means

pytestmark = pytest.mark.usefixtures("path")


def check(case: MeanCase) -> None:
    state = attend_means(*case)
    out, lse = expected_means(case)
    assert state.out.dtype == state.lse.dtype == torch.float32
    assert state.out.shape == out.shape and state.lse.shape == lse.shape
    assert relative_rms(state.out, out) < 2e-6
    torch.testing.assert_close(state.lse.double(), lse, atol=1e-5, rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(mean_cases(max_columns=40))
def test_pages_of_the_tail_count_as_their_means(case):
    check(case)


@pytest.mark.parametrize("is_run", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_many_pages(n, is_run):
    check(mean_case(n, 300, 2, 3, 33, torch.float32, is_run, 0.9, 1))


def test_the_example_of_the_docstring():
    logit = torch.tensor([1.0, 3, 7]).log().view(1, 1, 3)
    is_tail, values = torch.tensor([[True, True, False]]), torch.tensor([1.0, 5, 9]).view(1, 3, 1)
    state = attend_means(logit, is_tail, values, torch.arange(3)[None])
    torch.testing.assert_close(state.out.flatten(), torch.tensor([4.0]))
    torch.testing.assert_close(state.lse.flatten(), torch.tensor([4.0]).log())
