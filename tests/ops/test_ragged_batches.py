"""Batches whose sequences differ much in length: each gives what it gives alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relative_rms
from paged_cases import CaseSpec, ListSpec, build

from pikv_megatron.ops.decode_attention import decode_attention

LISTS = (
    ListSpec("int8", 8, 60, 1, 1, True, True, True), ListSpec("float32", 3, 30, 1, 1, True),
    ListSpec("float16", 16, 1, 1, 1),
)
SCALE = 0.2


# Parts of a sequence are dealt to threads.
pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.parametrize("threads", [1, 2, 5], indirect=True),
]


def one_by_one(query, lists):
    """Every sequence on its own."""
    results = []
    for row in range(len(query)):
        own = slice(row, row + 1)
        results.append(decode_attention(query[own], [
            x._replace(
                table=x.table[own], lens=x.lens[own],
                token_mask=None if x.token_mask is None else x.token_mask[own],
                logit_bias=None if x.logit_bias is None else x.logit_bias[own],
            ) for x in lists
        ], SCALE, with_mass=True))
    states, masses = zip(*results)
    return *(torch.cat(part) for part in zip(*states)), [torch.cat(part) for part in zip(*masses)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 3, 20, 60]), min_size=1, max_size=12),
       st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_batch_gives_what_its_sequences_give(columns, seed, dtype):
    """Masks, biases, several lists with holes."""
    case = build(CaseSpec(len(columns), 2, 2, 3, 48, 64, dtype, LISTS, seed))
    lists = []
    for each, shift in zip(case.lists, (0, 1, 2)):
        own = torch.tensor(columns).roll(shift)[:, None]
        is_read = torch.arange(each.lens.shape[1]) < own
        lists.append(each._replace(lens=each.lens * is_read))
    state, masses = decode_attention(case.query, lists, SCALE, with_mass=True)
    out, lse, right_masses = one_by_one(case.query, lists)
    tolerance = 3e-6 if dtype == torch.float32 else 4e-3
    assert state.out.dtype == out.dtype and relative_rms(state.out, out) < tolerance
    torch.testing.assert_close(state.lse, lse, atol=1e-5, rtol=1e-5)
    for mass, right in zip(masses, right_masses, strict=True):
        assert torch.equal(mass == 0, right == 0)
        torch.testing.assert_close(mass, right, atol=1e-6, rtol=1e-4)
    bare = decode_attention(case.query, lists, SCALE)
    assert bare[1] is None and torch.equal(bare[0].out, state.out)
