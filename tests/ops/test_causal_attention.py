"""Attention of a chunk to itself against float64, and the memory that it takes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracle import relative_rms
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_megatron.ops import causal_attention as module
from pikv_megatron.ops.causal_attention import causal_attention

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Torch's kernel takes exponentials of half types to four digits only.
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@st.composite
def chunks(draw):
    """Query, keys, values, lens and scale; keys and values of one tensor, as models make them."""
    num_groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width = draw(st.sampled_from([1, 16, 33, 64, 80, 128]))
    value_width = draw(st.sampled_from([width, width, 24]))
    lens = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 63, 257, 300]), max_size=4))
    dtype = draw(st.sampled_from([*TOLERANCE, torch.float32]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(sum(lens), num_groups * group, width, generator=rng) * 2
    both = torch.randn(sum(lens), num_groups, width + value_width, generator=rng)
    return (query.to(dtype), *both.to(dtype).split([width, value_width], dim=2), lens, width**-0.5)


def expected(query, keys, values, lens, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token over what it sees, in float64."""
    group = query.shape[1] // keys.shape[1]
    outs, lses = [], []
    for q, k, v in zip(*(x.double().split(lens) for x in (query, keys, values))):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        logits = torch.einsum("qhw,khw->hqk", q, k) * scale
        logits.masked_fill_(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("hqk,khw->qhw", logits.softmax(dim=2), v))
        lses.append(logits.logsumexp(dim=2).T)
    return torch.cat(outs), torch.cat(lses)


def check(query, keys, values, lens, scale) -> None:
    state = causal_attention(query, keys, values, lens, scale)
    assert state.out.dtype == query.dtype and state.lse.dtype == torch.float32
    assert state.out.shape == (*query.shape[:2], values.shape[2])
    assert state.lse.shape == query.shape[:2]
    if sum(lens):
        out, lse = expected(query, keys, values, lens, scale)
        assert relative_rms(state.out, out) < TOLERANCE[query.dtype]
        tolerance = LSE_TOLERANCE[query.dtype]
        torch.testing.assert_close(state.lse.double(), lse, atol=tolerance, rtol=1e-5)


@settings(deadline=None, max_examples=80)
@given(chunks())
def test_every_token_sees_its_sequence_up_to_itself(chunk):
    check(*chunk)


def test_channels_that_lie_apart():
    """Torch's kernel for CPUs reads them as if they lay side by side."""
    rng = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(9, h, 32, generator=rng)[..., ::2] for h in (4, 2, 2))
    check(query, keys, values, [5, 4], 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_that_torch_has_no_flash_attention_for(dtype, monkeypatch):
    monkeypatch.setattr(module, "CPU_DTYPES", ())
    rng = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(600, h, 16, generator=rng).to(dtype) for h in (4, 2, 2))
    check(query, keys, values, [513, 0, 87], 0.25)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("value_width", [16, 8])
def test_memory_does_not_grow_with_the_square_of_the_tokens(value_width):
    """With flash attention and without it; [t, t] bytes would be 64 MiB, a block's logits are 8."""
    num_tokens, rng = 8192, torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(num_tokens, 1, w, generator=rng) for w in (16, 16, value_width)
    )
    with Largest() as largest:
        causal_attention(query, keys, values, [num_tokens], 0.25)
    assert largest.num_bytes <= 4 * module.QUERY_BLOCK * num_tokens


def test_flash_attention_keeps_no_square_to_itself():
    """Nor does torch's operation allocate one inside."""
    num_tokens, rng = 8192, torch.Generator().manual_seed(3)
    query = torch.randn(num_tokens, 1, 16, generator=rng)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        causal_attention(query, query, query, [num_tokens], 0.25)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < taken < 16 << 20


def test_the_example_of_the_docstring():
    values = torch.tensor([1.0, 3, 5]).view(3, 1, 1)
    state = causal_attention(torch.ones(3, 1, 1), torch.zeros(3, 1, 1), values, [2, 1], 1.0)
    assert state.out.flatten().tolist() == [1, 2, 5]
    torch.testing.assert_close(state.lse.flatten(), torch.tensor([1.0, 2, 1]).log())


def test_tokens_that_no_sequence_has_are_refused():
    x = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match="lens sum to 2, but there are 3 tokens"):
        causal_attention(x, x, x, [1, 1], 1.0)
