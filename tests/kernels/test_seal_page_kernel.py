"""The Triton source of sealing against torch: the same bits, but where sums decide."""

import pytest
import torch
from guarded_pools import PageSpec, empty_pages, empty_sketch, page_specs, seal_case
from hypothesis import given, settings
from huge_pools import huge_pool, without_copies
from payloads import PAYLOADS, PLAIN, is_fitted, sides, together

from pikv_megatron.ops.make_sketch import make_sketch as torch_sketch
from pikv_megatron.ops.seal_page import seal_page as torch_seal
from pikv_megatron.types import KVPages

NUM_PAGES = 7


@pytest.fixture(scope="module")
def seal_page(triton_kernel):
    return triton_kernel("seal_page")


def check(seal_page, spec: PageSpec, device) -> None:
    case = seal_case(spec, NUM_PAGES, device)
    results = []
    for seal in (seal_page, torch_seal):
        pages, pools = empty_pages(spec, NUM_PAGES, device)
        sketch, sketch_pools = empty_sketch(
            spec.sketch, spec.num_groups, NUM_PAGES, spec.page_size, spec.key_width, spec.dtype,
            device,
        )
        seal(case.keys, case.values, pages, case.page, sketch, None, None, case.residual)
        for pool in pools + sketch_pools:
            pool.assert_rest_untouched(case.page)
        results.append([pool.view for pool in pools + sketch_pools])
    named = case.page[case.page >= 0]
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours[:, named], theirs[:, named], spec)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, spec: PageSpec) -> None:
    """Bits are the same, but for plain numbers and means: the interpreter rounds down to them.

    Lines through groups are of sums, whose order is anyone's: few bytes may differ, and scales by
    the last place of float16.
    """
    if any(map(is_fitted, sides(spec.payload))):
        if ours.dtype == torch.uint8:
            assert (ours != theirs).sum() <= 0.01 * ours.numel()
            return
        if ours.dtype == torch.float16:
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2.0**-9, atol=1e-3)
            return
    is_rounded = ours.dtype.is_floating_point and (
        spec.sketch == "mean" or any(side in PLAIN for side in sides(spec.payload))
    )
    rtol = 2.0**-7 if is_rounded else 0.0
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=rtol, atol=rtol * 2.0**-6)


@settings(deadline=None, max_examples=30)
@given(page_specs(max_groups=2))
def test_every_payload_and_sketch(seal_page, device, spec):
    check(seal_page, spec, device)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pages_of_500_tokens_and_wide_values(seal_page, device, payload):
    page_size = 500 if 500 % together(payload) == 0 else 504
    spec = PageSpec(payload, 1, 2, page_size, 33, 256, 2, 1, "low rank 2", torch.float32, 1)
    check(seal_page, spec, device)


def test_a_sketch_without_a_page(triton_kernel, device):
    keys = torch.randn(2, 3, 16, 20, device=device)
    page = torch.tensor([4, -1, 0], device=device)
    results = []
    for make_sketch in (triton_kernel("make_sketch"), torch_sketch):
        sketch, pools = empty_sketch("low rank 4", 2, 6, 16, 20, torch.float32, device)
        make_sketch(keys, sketch, page)
        for pool in pools:
            pool.assert_rest_untouched(page)
        results.append([pool.view[:, [0, 4]] for pool in pools])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_pools_of_more_than_two_billion_numbers(seal_page, device, monkeypatch):
    spec = PageSpec("int4", 2, 2, 16, 16, 16, 1, 1, "mean", torch.float32, 5)
    case = seal_case(spec, NUM_PAGES, device)
    fields = [
        huge_pool((2, 4, *shape), dtype, device) for shape, dtype in (
            ((8, 16), torch.uint8), ((8, 16), torch.uint8), ((1, 16), torch.float16),
            ((1, 16), torch.float16), ((16, 1), torch.float16), ((16, 1), torch.float16),
        )
    ]
    right, _ = empty_pages(spec, 4, device)
    page = torch.tensor([2, 0], device=device)
    without_copies(monkeypatch)
    seal_page(case.keys, case.values, KVPages(*fields), page)
    torch_seal(case.keys, case.values, right, page)
    for ours, theirs in zip(fields, right):
        assert torch.equal(ours[:, page], theirs[:, page])
