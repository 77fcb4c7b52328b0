"""What travels arrives as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_megatron.cache.home.query_header import HeaderLayout
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.step.step_choice import by_rank
from pikv_megatron.parallel.packet import pack_bits, pack_rows, unpack_bits, unpack_rows
from pikv_megatron.types import Reads

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_rows_of_any_types_share_a_packet(num_rows):
    generator = torch.Generator().manual_seed(0)
    fields = [
        torch.randint(0, 99, (num_rows, *shape), generator=generator).to(dtype)
        for dtype, shape in zip(DTYPES, [(3, 5), (7,), (4,), (1, 2, 3)])
    ]
    packed = pack_rows(fields)
    assert packed.dtype == torch.uint8 and packed.shape == (num_rows, 60 + 14 + 32 + 24)
    for field, again in zip(fields, unpack_rows(packed, fields)):
        assert again.dtype == field.dtype and torch.equal(again, field)


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 100), st.integers(0, 99))
def test_bits_come_back(num_rows, count, seed):
    flags = torch.rand(num_rows, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(flags)
    assert words.dtype == torch.int32 and words.shape == (num_rows, -(-count // 32))
    assert torch.equal(unpack_bits(words, count), flags)


def test_the_example_of_bits():
    assert pack_bits(torch.tensor([True, False, True])).tolist() == [5]


@settings(deadline=None)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_columns_are_dealt_to_their_ranks(num_ranks, num_columns, num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    total = num_ranks * num_columns
    order = torch.rand(num_rows, total, generator=generator).argsort(dim=1)
    columns = torch.where(torch.rand(num_rows, total, generator=generator) < 0.6, order, -1)
    dealt = by_rank(columns, num_ranks, num_columns)
    for row, chosen in enumerate(columns.tolist()):
        for rank in range(num_ranks):
            own = [c - rank * num_columns for c in chosen if c // num_columns == rank and c >= 0]
            listed = dealt[row, rank].tolist()
            assert listed[: len(own)] == own and set(listed[len(own) :]) <= {-1}


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("num_columns", [0, 3])
@pytest.mark.parametrize("num_heads", [0, 2])
@pytest.mark.parametrize("num_drawn", [0, 5])
def test_a_header_says_what_was_asked(is_routed, num_columns, num_heads, num_drawn):
    n, ranks, shards = 4, 2, 34
    visited = torch.rand(n, shards) < 0.5 if is_routed else None
    columns = torch.randint(-1, 9, (n, ranks, num_columns)) if num_columns else None
    lse = torch.randn(n, ranks, num_heads) if num_heads else None
    drawn = torch.randint(-1, 9, (n, ranks, num_drawn)) if num_drawn else None
    weight = torch.rand(n) if num_drawn else None
    layout = HeaderLayout(shards if is_routed else 0, num_columns, num_heads, num_drawn)
    slots, positions = torch.arange(10, 10 + n), torch.arange(70, 70 + n)
    every = OwnerReads(slots, 9, tuple(slots.tolist()), positions=positions)
    header = layout.pack(Reads(visited, columns, drawn, weight), every, lse, ranks)
    if header is None:
        assert layout.unpack(None, every) == (every, None)
        return
    for rank in range(ranks):
        reads, told = layout.unpack(header[:, rank], every)
        assert torch.equal(reads.slots, slots) and torch.equal(reads.positions, positions)
        assert reads.visited is None if visited is None else torch.equal(reads.visited, visited)
        right = None if columns is None else columns[:, rank]
        assert reads.columns is None if right is None else torch.equal(reads.columns, right)
        if num_drawn:
            assert torch.equal(reads.drawn, drawn[:, rank])
            assert torch.equal(reads.log_weight, weight)
        assert told is None if lse is None else torch.equal(told, lse[:, rank])
