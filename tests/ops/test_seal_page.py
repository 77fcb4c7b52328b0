"""Sealed pages are what they were made of; nothing else is written."""

import pytest
import torch
from guarded_pools import (
    PageSpec,
    empty_pages,
    empty_sketch,
    page_specs,
    poisoned,
    seal_case,
)
from hypothesis import given, settings
from oracle import expand, expand_pages
from payloads import PAYLOADS, bits_of, is_fitted, sides

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.packing import quantise
from pikv_megatron.ops.seal_page import seal_page
from pikv_megatron.types import BoundingBoxSketch, KVPages

NUM_PAGES = 7
# A plain number is off by half of its last place; float8 by a sixteenth.
RELATIVE = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8": 2.0**-4}


@settings(deadline=None, max_examples=60)
@given(page_specs())
def test_every_payload_and_sketch(spec):
    case = seal_case(spec, NUM_PAGES)
    pages, pools = empty_pages(spec, NUM_PAGES)
    sketch, sketch_pools = empty_sketch(
        spec.sketch, spec.num_groups, NUM_PAGES, spec.page_size, spec.key_width, spec.dtype
    )
    seal_page(case.keys, case.values, pages, case.page, sketch, residual=case.residual)
    for pool in pools + sketch_pools:
        pool.assert_rest_untouched(case.page)
    is_kept = case.page >= 0
    named = case.page[is_kept]
    for stored, x, error, side in zip(
        expand_pages(pages), (case.keys, case.values), half_scales(pages, spec),
        sides(spec.payload), strict=True,
    ):
        if x is None:  # columns of the keys, all of them
            continue
        stored = stored[:, named]
        if is_fitted(side):
            groups = (2, spec.key_groups, 3) if x is case.keys else (3, spec.value_groups, 4)
            torch.testing.assert_close(stored, fitted(x[:, is_kept], bits_of(side), *groups))
            continue
        x = x.double()[:, is_kept]
        slack = x.abs() * (RELATIVE.get(side, 0) + 2.0**-20) + 1e-7
        assert ((stored - x).abs() <= error[:, named] * (1 + 2.0**-10) + slack).all()
    check_sketch(sketch, case.keys[:, is_kept].double(), named, case.residual[:, is_kept])


def fitted(x: torch.Tensor, bits: int, dim: int, count: int, along: int) -> torch.Tensor:
    """What is stored of [ng, c, S, r] whose dimension `dim` has `count` groups."""
    codes, scale, zero = quantise(x.unflatten(dim, (count, -1)), bits, along)
    return (codes.double() * scale.double() + zero.double()).flatten(dim, dim + 1)


def half_scales(pages: KVPages, spec: PageSpec) -> list[torch.Tensor]:
    """Half a scale for every number (float8: the spacing next to 0), each [ng, p, S, r]."""
    groups = (spec.page_size // spec.key_groups, 2), (spec.value_width // spec.value_groups, 3)
    scales, errors = (pages.key_scale, pages.value_scale), []
    for side, scale, (size, dim) in zip(sides(spec.payload), scales, groups):
        factor = 2.0**-10 if side == "float8" else 0.5
        whole = torch.zeros(1, NUM_PAGES, 1, 1).double() if scale is None else (
            scale.double().repeat_interleave(size, dim)
        )
        errors.append(whole * factor)
    return errors


def check_sketch(sketch, keys: torch.Tensor, named: torch.Tensor, residual) -> None:
    """Keys [ng, c, S, w], float64, against the rows `named` of a sketch."""
    if hasattr(sketch, "mean"):
        mean = sketch.mean[:, named]
        torch.testing.assert_close(mean.float(), keys.mean(2).float(), rtol=1e-2, atol=1e-3)
    elif hasattr(sketch, "low"):
        assert torch.equal(sketch.low[:, named].double(), keys.amin(2))
        assert torch.equal(sketch.high[:, named].double(), keys.amax(2))
    else:
        as_pages = KVPages(sketch.codes, sketch.codes, sketch.scale.unsqueeze(2), None,
                           torch.empty(1, 1, sketch.page_size, 1))
        stored = expand(sketch.codes, sketch.scale.unsqueeze(2), sketch.zero.unsqueeze(2),
                        as_pages, (sketch.page_size, 1))[:, named]
        half = sketch.scale[:, named].double().unsqueeze(2) / 2
        assert ((stored - keys).abs() <= half * (1 + 2.0**-10) + keys.abs() * 2.0**-20).all()
        assert torch.equal(sketch.residual[:, named], residual)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_lost_pages_may_be_all_of_them(payload):
    spec = PageSpec(payload, 2, 3, 16, 16, 16, 2, 2, "mean", torch.float32, 0)
    case = seal_case(spec, NUM_PAGES)
    pages, pools = empty_pages(spec, NUM_PAGES)
    nowhere = torch.full((3,), -1)
    seal_page(case.keys, case.values, pages, nowhere)
    for pool in pools:
        pool.assert_rest_untouched(nowhere)


def test_the_sketch_has_rows_and_keys_of_its_own():
    spec = PageSpec("int2", 2, 3, 16, 16, 16, 2, 2, "box", torch.float32, 0)
    case = seal_case(spec, NUM_PAGES)
    pages, _ = empty_pages(spec, NUM_PAGES)
    sketch, pools = empty_sketch("box", 2, 9, 16, 5, torch.float32)
    narrow, row = poisoned(torch.randn(2, 3, 16, 5)), torch.tensor([4, 0, -1])
    seal_page(case.keys, case.values, pages, case.page, sketch, row, narrow)
    check_sketch(sketch, narrow[:, :2].double(), row[:2], None)
    pools[0].assert_rest_untouched(row)


def test_a_sketch_can_be_made_without_a_page():
    sketch, _ = empty_sketch("low rank 4", 1, 3, 8, 4, torch.float32)
    make_sketch(torch.randn(1, 1, 8, 4), sketch, torch.tensor([1]))
    assert sketch.residual[0, 1] == torch.inf


def test_boxes_that_would_not_hold_their_keys_are_refused():
    box = BoundingBoxSketch(*torch.zeros(2, 1, 2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="allocate the sketch in the dtype of the keys"):
        make_sketch(torch.randn(1, 1, 8, 4), box, torch.tensor([0]))


def test_two_groups_of_two_bits_are_the_byte_of_the_kernels_example():
    spec = PageSpec("int2", 1, 1, 4, 1, 2, 2, 2, "mean", torch.float32, 0)
    pages, _ = empty_pages(spec, 2)
    keys = torch.tensor([0.0, 3, 10, 16]).view(1, 1, 4, 1)
    seal_page(keys, keys.expand(1, 1, 4, 2), pages, torch.tensor([0]))
    assert pages.keys[0, 0].item() == 204
    assert pages.key_scale[0, 0].flatten().tolist() == [1, 2]
    assert pages.key_zero[0, 0].flatten().tolist() == [0, 10]
