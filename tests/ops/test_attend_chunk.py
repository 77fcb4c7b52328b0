"""A prompt's piece over pages, against float64 and against the path of few queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import expected_attention, relative_rms
from paged_cases import PAYLOADS, CaseSpec, ListSpec, build, case_specs

from pikv_megatron.ops import attend_chunk as module
from pikv_megatron.ops.decode_attention import decode_attention

TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def check(spec: CaseSpec) -> None:
    case = build(spec)
    assert module.is_chunk(case.query, case.lists)
    state, _ = decode_attention(case.query, case.lists, case.softmax_scale)
    expected = expected_attention(case.query, case.lists, case.softmax_scale)
    assert state.out.dtype == case.query.dtype and state.lse.dtype == torch.float32
    assert relative_rms(state.out, expected.out) < TOLERANCE[spec.dtype]
    torch.testing.assert_close(state.lse.double(), expected.lse, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(case_specs(max_tokens=300), st.sampled_from([1, 100, 16384]))
def test_every_payload_shape_and_mask(spec, block_tokens):
    lists = tuple(each._replace(has_multiplicity=False) for each in spec.lists)
    spec = spec._replace(n=1, sq=module.MIN_QUERIES, value_width=spec.key_width, lists=tuple(
        each._replace(value_groups=1) for each in lists
    ))
    if spec.is_shared:
        spec = spec._replace(value_width=max(1, spec.key_width - 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_TOKENS", block_tokens)
        check(spec)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("is_run", [True, False])
def test_many_pages_in_several_blocks(payload, is_run, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 512)
    lists = (ListSpec(payload, 16, 100, 2, 4, is_run=is_run, is_full=True),
             ListSpec("float32", 64, 3, 1, 1))
    check(CaseSpec(1, 80, 2, 4, 64, 64, torch.float32, lists))


def test_nothing_to_read_is_an_empty_state():
    lists = (ListSpec("float32", 4, 0, 1, 1), ListSpec("int4", 8, 0, 1, 1))
    check(CaseSpec(1, 64, 2, 2, 16, 16, torch.float32, lists))


def test_what_it_does_not_serve_goes_the_other_way():
    plain = (ListSpec("float32", 4, 5, 1, 1),)
    for spec in (
        CaseSpec(1, module.MIN_QUERIES - 1, 2, 2, 16, 16, torch.float32, plain),
        CaseSpec(2, 64, 2, 2, 16, 16, torch.float32, plain),
        CaseSpec(1, 64, 2, 2, 16, 48, torch.float32, plain),
        CaseSpec(1, 64, 2, 2, 16, 16, torch.float32, (plain[0]._replace(has_multiplicity=True),)),
    ):
        case = build(spec)
        assert not module.is_chunk(case.query, case.lists)
