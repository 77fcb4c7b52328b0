"""The Triton source of projection, on the cases of the torch version."""

import pytest
import torch
from hypothesis import given, settings
from test_project import check, project_cases


@pytest.fixture(scope="module")
def project(triton_kernel):
    return triton_kernel("project")


@settings(deadline=None, max_examples=20)
@given(project_cases(shapes=((), (0,), (1,), (3, 2), (21,))))
def test_every_head_has_the_basis_of_its_group(project, device, case):
    check(project, [x if x is None else _moved(x, device) for x in case])


def test_500_tokens_of_keys(project, device):
    keys, basis = torch.randn(500, 2, 33, device=device), torch.randn(2, 33, 65, device=device)
    check(project, (keys, basis, None))


def test_keys_keep_heads_outermost_in_memory(project, device):
    keys = torch.randn(2, 5, 8, device=device).transpose(0, 1)
    out = project(keys, torch.randn(2, 8, 3, device=device))
    assert out.transpose(0, 1).is_contiguous()


def _moved(x: torch.Tensor, device) -> torch.Tensor:
    """On the device; with its strides and neighbours where it is there already."""
    return x if x.device.type == torch.device(device).type else x.to(device)
