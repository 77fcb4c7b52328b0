"""Every head is multiplied by the basis of its group, whatever its strides."""

import hypothesis.strategies as st
import torch
from guarded_pools import poisoned
from hypothesis import given, settings
from oracle import relative_rms

from pikv_megatron.ops.project import project

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@st.composite
def project_cases(draw, shapes=((), (0,), (1,), (3, 2), (63,), (1, 500))):
    """x [*shape, heads, w_in], laid out with tokens or with heads first; NaN around it."""
    num_groups, group = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 7, 16]))
    rows = draw(st.sampled_from(shapes))
    widths = [draw(st.sampled_from([16, 33, 64, 128, 256])) for _ in range(2)]
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(*rows, num_groups * group, widths[0], generator=rng).to(dtype)
    if len(rows) == 1 and draw(st.booleans()):
        x = poisoned(x.transpose(0, 1)).transpose(0, 1)
    elif len(rows) < 2:
        x = poisoned(x)
    basis = poisoned(torch.randn(num_groups, *widths, generator=rng).to(dtype))
    bias = torch.randn(num_groups, widths[1], generator=rng).to(dtype)
    return x, basis, bias if draw(st.booleans()) else None


def expected(x, basis, bias) -> torch.Tensor:
    group = x.shape[-2] // basis.shape[0]
    parts = []
    for head in range(x.shape[-2]):
        part = x[..., head, :].double() @ basis[head // group].double()
        parts.append(part if bias is None else part + bias[head // group].double())
    return torch.stack(parts, dim=-2)


def check(op, case) -> None:
    out, right = op(*case), expected(*case)
    assert out.shape == right.shape and out.dtype == case[0].dtype
    assert relative_rms(out, right) < TOLERANCE[out.dtype]


@settings(deadline=None, max_examples=80)
@given(project_cases())
def test_every_head_has_the_basis_of_its_group(case):
    check(project, case)


def test_keys_keep_heads_outermost_in_memory():
    keys = torch.randn(2, 5, 8).transpose(0, 1)
    assert project(keys, torch.randn(2, 8, 3)).transpose(0, 1).is_contiguous()


def test_the_example_of_the_docstring():
    basis = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    assert project(torch.ones(4, 1), basis).flatten().tolist() == [2, 2, 3, 3]
