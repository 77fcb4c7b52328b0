"""Paged attention on a CPU, by its kernel and by torch, against float64."""

import pytest
import torch
from hypothesis import given, settings
from oracle import expected_attention, relative_rms
from paged_cases import PAYLOADS, CaseSpec, ListSpec, build, case_specs

from pikv_megatron.ops.decode_attention import decode_attention

pytestmark = pytest.mark.usefixtures("path")
# Everything is summed in float32; the result is rounded once.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def check(spec: CaseSpec) -> None:
    case = build(spec)
    before = [x.view(torch.uint8).clone() for x in case.allocations]
    state, masses = decode_attention(case.query, case.lists, case.softmax_scale, with_mass=True)
    expected = expected_attention(case.query, case.lists, case.softmax_scale)
    assert state.out.dtype == case.query.dtype and state.lse.dtype == torch.float32
    assert relative_rms(state.out, expected.out) < TOLERANCE[spec.dtype]
    torch.testing.assert_close(state.lse.double(), expected.lse, atol=1e-5, rtol=1e-5)
    for mass, right in zip(masses, expected.masses, strict=True):
        assert mass.dtype == torch.float32 and mass.shape == right.shape
        assert torch.equal(mass == 0, right == 0)
        assert relative_rms(mass, right) < 1e-5
    for whole, old in zip(case.allocations, before):
        assert torch.equal(whole.view(torch.uint8), old)


@settings(deadline=None, max_examples=120)
@given(case_specs(max_tokens=300))
def test_every_payload_shape_and_mask(spec):
    check(spec)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_pages(payload, dtype):
    lists = (ListSpec(payload, 16, 500, 2, 4), ListSpec(payload, 64, 40, 1, 1, is_full=True))
    check(CaseSpec(2, 2, 4, 4, 128, 128, dtype, lists))


@pytest.mark.parametrize("payload", ["float32", "bfloat16", "float8", "int4", "int3"])
def test_latent_rows_of_many_heads(payload):
    lists = (ListSpec(payload, 16, 30, 2, 1), ListSpec(payload, 64, 4, 1, 1, is_full=True))
    check(CaseSpec(2, 1, 1, 40, 576, 512, torch.float32, lists, is_shared=True))


def test_nothing_listed_is_an_empty_state():
    lists = (ListSpec("float32", 4, 0, 1, 1), ListSpec("int4", 8, 0, 1, 1))
    check(CaseSpec(2, 1, 2, 2, 16, 48, torch.bfloat16, lists))


def test_each_page_of_a_pair_of_equals_has_half_the_mass():
    spec = CaseSpec(1, 1, 1, 1, 16, 16, torch.float32,
                    (ListSpec("float32", 1, 1, 1, 1, is_full=True),) * 2)
    case = build(spec)
    state, masses = decode_attention(torch.zeros_like(case.query), case.lists, 1.0, with_mass=True)
    assert [float(mass) for mass in masses] == [0.5, 0.5]
    torch.testing.assert_close(float(state.lse), float(torch.tensor(2.0).log()))
    assert decode_attention(case.query, case.lists, 1.0)[1] is None


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pools_that_lie_together_give_the_same(payload):
    """Views of a larger allocation are gathered in another way."""
    case = build(CaseSpec(2, 1, 3, 2, 48, 64, torch.float32, (ListSpec(payload, 8, 30, 2, 4),)))
    (each,) = case.lists
    compact = each._replace(pages=type(each.pages)(
        *[None if x is None else x.contiguous() for x in each.pages]
    ))
    states = [decode_attention(case.query, [x], 0.2)[0] for x in (each, compact)]
    assert torch.equal(states[0].out, states[1].out)
    assert torch.equal(states[0].lse, states[1].lse)
