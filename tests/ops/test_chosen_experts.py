"""The C++ kernel of SwiGLU experts against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_kernels.cpu.chosen_experts import chosen_experts

# Of what an output would be if no product cancelled another; 16-bit outputs are rounded once.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.parametrize("threads", [1, 3], indirect=True),
]


def expected(tokens, experts, weights, weight1, weight2) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, [t, h]; and how large it would be of magnitudes alone."""
    out, size = torch.zeros(2, *tokens.shape, dtype=torch.float64)
    for token, chosen in enumerate(experts.tolist()):
        for rank, expert in enumerate(chosen):
            if 0 <= expert < len(weight1):
                first, second = weight1[expert].double(), weight2[expert].double()
                x, weight = tokens[token].double(), weights[token, rank].double()
                gate, up = (first @ x).chunk(2)
                out[token] += second @ (F.silu(gate) * up * weight)
                gate, up = (first.abs() @ x.abs()).chunk(2)
                size[token] += second.abs() @ (gate * up * weight)
    return out, size


def check(t: int, k: int, num_experts: int, h: int, f: int, dtype: torch.dtype, seed: int) -> None:
    """Some experts are of other ranks, and nobody's weights are poison."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tokens, weights = normal(t, h).to(dtype), normal(t, k).abs().to(dtype)
    experts = torch.stack([torch.randperm(num_experts + k, generator=generator)[:k] - 1
                           for _ in range(t)])
    weight1 = (3 * normal(num_experts, 2 * f, h) / h**0.5).to(dtype)
    weight2 = (normal(num_experts, h, f) / f**0.5).to(dtype)
    is_idle = torch.ones(num_experts, dtype=torch.bool)
    is_idle[experts[(experts >= 0) & (experts < num_experts)]] = False
    weight1[is_idle], weight2[is_idle] = torch.nan, torch.nan
    found = chosen_experts(tokens, experts, weights, weight1, weight2)
    assert found.dtype == dtype and found.shape == tokens.shape
    wanted, size = expected(tokens, experts, weights, weight1, weight2)
    assert ((found - wanted).abs() <= TOLERANCES[dtype] * size).all()


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 70),
    st.integers(1, 70), st.sampled_from(list(TOLERANCES)), st.integers(0, 1000),
)
def test_every_shape_and_type(t, k, num_experts, h, f, dtype, seed):
    check(t, k, num_experts, h, f, dtype, seed)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_threads_share_wide_experts(dtype):
    check(5, 2, 4, 300, 260, dtype, 1)


def test_large_gates_do_not_overflow():
    tokens, weights = torch.tensor([[1.0]]), torch.ones(1, 1)
    for gate in (-500.0, -90.0, 90.0, 500.0):
        weight1 = torch.tensor([[[gate], [2.0]]])
        found = chosen_experts(tokens, torch.zeros(1, 1).long(), weights, weight1,
                               torch.ones(1, 1, 1))
        torch.testing.assert_close(found, F.silu(torch.tensor([[gate]])) * 2, atol=1e-30, rtol=1e-6)
