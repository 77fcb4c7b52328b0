"""Parts of an attention travel in no more bytes than they have, and arrive as they were sent."""

import pytest
import torch

from pikv_megatron.cache.partial_states import num_words, pack_state, unpack_states
from pikv_megatron.types import AttentionState


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 8, 64])
def test_parts_arrive_as_they_were_sent(dtype, width):
    states = [
        AttentionState(torch.randn(3, 1, 4, width).to(dtype), torch.randn(3, 1, 4))
        for _ in range(2)
    ]
    states[1].lse[0] = -torch.inf
    packed = torch.stack([pack_state(state) for state in states])
    assert packed.shape[-1] == num_words(width, dtype) and packed.dtype == torch.float32
    halves = dtype.itemsize == 2 and width % 2 == 0
    assert num_words(width, dtype) == 1 + (width // 2 if halves else width)
    for sent, arrived in zip(states, unpack_states(packed, states[0].out)):
        assert torch.equal(arrived.out.to(dtype), sent.out) and torch.equal(arrived.lse, sent.lse)


def test_a_part_that_nobody_gave_counts_nothing():
    """Such words are filled with minus infinity, whatever they stand for."""
    like = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    (state,) = unpack_states(torch.full((1, 1, 1, 1, 3), -torch.inf), like)
    assert state.lse.item() == -torch.inf and not state.out.isnan().any()
