"""The Triton source of paged attention against torch and against float64."""

import pytest
import torch
from hypothesis import given, settings
from oracle import expected_attention, relative_rms
from paged_cases import PAYLOADS, CaseSpec, ListSpec, build, case_specs
from triton.runtime.interpreter import InterpreterBuilder

from pikv_megatron.ops.decode_attention import decode_attention as torch_attention

# Keys, weights and values are rounded to the query's type before each product.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture(scope="module")
def attention(triton_kernel):
    return triton_kernel("decode_attention")


def check(attention, spec: CaseSpec, device: torch.device) -> None:
    case = build(spec, device)
    before = [x.view(torch.uint8).clone() for x in case.allocations]
    (out, lse), masses = attention(case.query, case.lists, case.softmax_scale, with_mass=True)
    for whole, old in zip(case.allocations, before):
        assert torch.equal(whole.view(torch.uint8), old)
    ours, theirs = torch_attention(case.query, case.lists, case.softmax_scale, with_mass=True)
    expected = expected_attention(case.query, case.lists, case.softmax_scale)
    tolerance, lse_tolerance = TOLERANCE[spec.dtype], LSE_TOLERANCE[spec.dtype]
    assert out.dtype == case.query.dtype and out.shape == expected.out.shape
    for right in (expected.out, ours.out):
        assert relative_rms(out, right) < tolerance
    for right in (expected.lse, ours.lse.double()):
        torch.testing.assert_close(lse.double(), right, atol=lse_tolerance, rtol=1e-5)
    for mass, right, other in zip(masses, expected.masses, theirs, strict=True):
        assert torch.equal(mass == 0, right == 0)
        assert relative_rms(mass, right) < 2 * tolerance
        assert relative_rms(mass, other) < 2 * tolerance


@settings(deadline=None, max_examples=25)
@given(case_specs(max_tokens=150))
def test_every_payload_shape_and_mask(attention, device, spec):
    check(attention, spec, device)


def test_thousands_of_small_pages(attention, device):
    lists = (ListSpec("float32", 1, 2000, 1, 1), ListSpec("int8", 3, 1, 3, 1, is_full=True))
    check(attention, CaseSpec(1, 1, 1, 2, 16, 48, torch.float32, lists), device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_several_lists_and_splits(attention, device, payload, dtype):
    lists = (ListSpec(payload, 16, 20, 2, 5, True), ListSpec(payload, 64, 9, 1, 1, is_full=True))
    check(attention, CaseSpec(2, 2, 1, 4, 96, 80, dtype, lists), device)


@pytest.mark.parametrize("payload", ["bfloat16", "int4", "float8"])
@pytest.mark.parametrize("value_width", [128, 160])
def test_latent_rows(attention, device, payload, value_width):
    lists = (ListSpec(payload, 16, 20, 2, 1, True), ListSpec(payload, 64, 3, 1, 1))
    spec = CaseSpec(2, 1, 1, 20, 160, value_width, torch.float32, lists, is_shared=True)
    check(attention, spec, device)


@pytest.mark.parametrize("payload", ["float32", "float8", "int8", "int4", "int2"])
def test_keys_alone(attention, device, payload):
    """Where pages are judged by their keys, values are one channel of them."""
    lists = (ListSpec(payload, 16, 20, 2, 1), ListSpec(payload, 64, 3, 2, 1, has_bias=True))
    check(attention, CaseSpec(2, 1, 2, 4, 64, 1, torch.float32, lists, is_shared=True), device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's products")
def test_padding_is_not_gone_through(attention, device, monkeypatch):
    """Tiles of 4 pages: 10 + 1 + 0 + 1 of them hold what four sequences read, not 4 * 10; the last
    one reads its newest pages only."""
    count, create_dot = [0], InterpreterBuilder.create_dot

    def counting(*args):
        count[0] += 1
        return create_dot(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    spec = CaseSpec(4, 1, 2, 4, 64, 64, torch.float32,
                    (ListSpec("float32", 16, 40, 1, 1, is_full=True),))
    case = build(spec, device)
    is_read = torch.arange(40) < torch.tensor([40, 1, 0, 40])[:, None]
    is_read[3, :38] = False
    lists = [case.lists[0]._replace(lens=case.lists[0].lens * is_read)]
    (out, lse), masses = attention(case.query, lists, 0.125, with_mass=True)
    assert count[0] == 2 * 2 * 12  # KV heads, keys and values
    right = expected_attention(case.query, lists, 0.125)
    assert relative_rms(out, right.out) < TOLERANCE[torch.float32]
    assert torch.equal(masses[0] == 0, right.masses[0] == 0)
    assert torch.equal(lse[2], torch.full_like(lse[2], -torch.inf))
