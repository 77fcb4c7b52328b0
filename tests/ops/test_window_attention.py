"""Attention in a sliding window, and with a logit that is no token's, against float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracle import relative_rms

from pikv_megatron.ops import window_attention as module
from pikv_megatron.ops.sink_logit import with_sink
from pikv_megatron.ops.window_attention import window_attention
from pikv_megatron.types import AttentionState

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@st.composite
def pieces(draw):
    """Query, keys, values, window and scale of a piece behind a past."""
    num_groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width, value_width = draw(st.sampled_from([(16, 16), (33, 24)]))
    new, window = draw(st.sampled_from([1, 2, 63, 300])), draw(st.sampled_from([1, 2, 40, 500]))
    past = draw(st.integers(0, window - 1))
    dtype = draw(st.sampled_from([*TOLERANCE, torch.float32]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(new, num_groups * group, width, generator=rng) * 2
    both = torch.randn(past + new, num_groups, width + value_width, generator=rng)
    keys, values = both.to(dtype).split([width, value_width], dim=2)
    return query.to(dtype), keys, values, window, width**-0.5


def expected(query, keys, values, window, scale, sink=None):
    """Output and log-sum-exp in float64; a sink is one more key without a value."""
    group, past = query.shape[1] // keys.shape[1], len(keys) - len(query)
    query, keys, values = (x.double() for x in (query, keys, values))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    logits = torch.einsum("qhw,khw->hqk", query, keys) * scale
    distance = torch.arange(len(query)).unsqueeze(1) + past - torch.arange(len(keys))
    logits.masked_fill_((distance < 0) | (distance >= window), -torch.inf)
    lse = logits.logsumexp(dim=2).T
    if sink is not None:
        extra = sink.double().view(-1, 1, 1).expand(-1, len(query), 1)
        logits = torch.cat([logits, extra], dim=2)
    weights = logits.softmax(dim=2)[:, :, : len(keys)]
    return torch.einsum("hqk,khw->qhw", weights, values), lse


@settings(deadline=None, max_examples=60)
@given(pieces())
@pytest.mark.parametrize("block", [module.QUERY_BLOCK, 7])
def test_every_token_sees_its_window(block, piece):
    query = piece[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERY_BLOCK", block)
        state = window_attention(*piece)
    out, lse = expected(*piece)
    assert state.out.dtype == query.dtype and state.lse.dtype == torch.float32
    assert relative_rms(state.out, out) < TOLERANCE[query.dtype]
    torch.testing.assert_close(state.lse.double(), lse, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(pieces(), st.sampled_from([-60.0, -2.0, 0.0, 3.0, 90.0]))
def test_a_sink_takes_its_share_once(piece, level):
    sink = level + torch.randn(piece[0].shape[1], generator=torch.Generator().manual_seed(1))
    state = window_attention(*piece)
    out = with_sink(state, sink)
    assert out.dtype == piece[0].dtype and out.isfinite().all()
    reference = expected(*piece, sink)[0]
    tolerance = TOLERANCE[out.dtype]
    assert (out.double() - reference).norm() <= 2 * tolerance * reference.norm() + 1e-6


def test_nothing_seen_stays_nothing():
    state = AttentionState(torch.zeros(2, 1, 4), torch.full((2, 1), -torch.inf))
    assert torch.equal(with_sink(state, torch.tensor([0.5])), state.out)
    assert with_sink(state, None) is state.out


def test_a_small_example():
    values = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1)
    state = window_attention(torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), values, 2, 1.0)
    assert state.out.flatten().tolist() == [1.0, 2.0, 4.0]
    assert with_sink(state, torch.zeros(1)).flatten()[0] == 0.5
