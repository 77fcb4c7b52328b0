"""Numbers and what is stored of them: how far they differ, wherever a group lies."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pikv_megatron.ops.packing import (
    ceil_half,
    floor_half,
    pack,
    quantise,
    quantise_covering,
    quantise_float8,
    unpack,
)

pytestmark = pytest.mark.usefixtures("path")

NUMBERS = st.floats(-60000, 60000, width=32, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from([2, 3, 4, 8]))
def test_a_number_is_off_by_half_a_scale(numbers, bits):
    x = torch.tensor(numbers)
    codes, scale, zero = quantise_covering(x, bits)
    stored = codes.double() * scale.double() + zero.double()
    # Besides half a scale, the last place of float32 in x - zero.
    slack = x.double().abs() * 2.0**-22 + scale.double() * 2.0**-15
    assert ((stored - x.double()).abs() <= scale.double() / 2 + slack).all()
    assert int(codes.max()) < 2**bits


def expanded(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double() + zero.double()


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from([2, 3, 4, 8]))
def test_a_line_is_never_much_worse_than_all_of_the_range(numbers, bits):
    x = torch.tensor(numbers)
    codes, *rest = quantise(x, bits)
    errors = [(expanded(*of(x, bits)) - x).square().sum() for of in (quantise, quantise_covering)]
    # Besides twice the error, the last place of float32 in the numbers.
    assert errors[0] <= 2 * errors[1] + len(x) * (2.0**-20 * x.double().abs().max()) ** 2
    assert int(codes.max()) < 2**bits and all(part.isfinite().all() for part in rest)


@pytest.mark.parametrize("bits, most", [(2, 0.9), (3, 0.97), (4, 0.99)])
@pytest.mark.parametrize("group", [32, 64])
def test_a_line_stores_more_of_a_group_and_nothing_smaller(bits, most, group):
    x = torch.randn(500, group, generator=torch.Generator().manual_seed(0)) + 3
    errors = [(expanded(*of(x, bits)) - x).norm() for of in (quantise, quantise_covering)]
    assert errors[0] <= most * errors[1]
    about = x.double() - x.double().mean(1, keepdim=True)
    products = (expanded(*quantise(x, bits)) * about).sum(1), about.square().sum(1)
    torch.testing.assert_close(*products, rtol=1e-2, atol=0)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("shape, dim", [((3, 5, 40, 33), 2), ((90, 8, 64), -1), ((2, 7), 0)])
def test_groups_may_lie_along_any_dimension(shape, dim, threads):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for bits in (2, 3, 4, 8):
        parts = quantise(x.transpose(0, 1), bits, 1 if dim == 0 else dim)
        moved = quantise(x.movedim(dim, -1).contiguous(), bits)
        errors = [
            (expanded(*parts).transpose(0, 1) - x).square().sum(dim),
            (expanded(*moved) - x.movedim(dim, -1)).square().sum(-1),
        ]
        torch.testing.assert_close(*errors, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_stored_is_stored_again_as_it_is(bits):
    """As of values, which travel as their pages will store them."""
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    once = expanded(*quantise(x, bits))
    torch.testing.assert_close(expanded(*quantise(once, bits)), once, rtol=1e-3, atol=1e-5)


def test_the_groups_of_the_docstrings():
    codes, scale, zero = quantise_covering(torch.tensor([0.0, 1, 2, 6]), 2)
    assert codes.tolist() == [0, 0, 1, 3] and scale.item() == 2 and zero.item() == 0
    codes, scale, zero = quantise(torch.tensor([0.0, 0, 0, 1, 2, 2, 2, 6]), 2)
    assert codes.tolist() == [0, 0, 0, 0, 1, 1, 1, 3]
    assert scale.item() == pytest.approx(1.956, abs=1e-3)
    assert zero.item() == pytest.approx(0.158, abs=1e-3)
    codes, scale = quantise_float8(torch.tensor([-14.0, 3.5]))
    assert codes.float().tolist() == [-448, 112] and scale.item() == 1 / 32


def test_numbers_that_are_all_alike_are_kept_to_float16():
    codes, scale, zero = quantise_covering(torch.full((3, 8), 0.1), 4)
    stored = codes * scale.float() + zero.float()
    assert (stored - 0.1).abs().max() <= scale.float().max() / 2 <= 1e-4
    codes, scale, zero = quantise(torch.zeros(8), 2)
    assert scale.item() == 0 and not codes.any()


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_float8_is_off_by_a_sixteenth(numbers):
    x = torch.tensor(numbers)
    codes, scale = quantise_float8(x)
    stored = codes.double() * scale.double()
    bound = torch.maximum(x.double().abs() / 16, scale.double() * 2.0**-10)
    assert ((stored - x.double()).abs() <= bound * (1 + 2.0**-10)).all()


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_halves_are_rounded_outwards_by_one_step(number):
    x = torch.tensor(number)
    below, above = floor_half(x), ceil_half(x)
    inside = x.clamp(-65504, 65504)
    assert below.float() <= inside <= above.float()
    assert above.double() - below.double() <= 2.0 * max(inside.abs().item() * 2.0**-10, 2.0**-24)
    if x.half().float() == x:
        assert below == above == x.half()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("page_size", [8, 504])
def test_unpack_is_the_inverse_of_pack(bits, page_size):
    codes = torch.randint(0, 2**bits, (2, 3, page_size, 5)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, page_size * bits // 8, 5)
    assert torch.equal(unpack(packed, bits), codes)


def test_the_byte_of_the_docstring():
    assert pack(torch.tensor([[3], [0], [2], [1]], dtype=torch.uint8), 2).item() == 99


def test_three_bits_are_two_and_one():
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    low = [0 + 2 * 4 + 0 * 16 + 2 * 64, 1 + 3 * 4 + 1 * 16 + 3 * 64]
    assert pack(codes, 3).flatten().tolist() == [*low, 0b11110000]
