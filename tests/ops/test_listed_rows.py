"""Blocks of a table, and the rows that are taken for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_megatron.ops.listed_rows import MIN_COLUMNS, run_of, table_blocks, take_rows


@given(st.integers(0, 30), st.integers(0, 70), st.integers(1, 50), st.integers(1, 5000))
def test_every_entry_is_in_one_block(num_rows, num_columns, entry_bytes, block_bytes):
    seen = torch.zeros(num_rows, num_columns, dtype=torch.int64)
    for rows, columns in table_blocks(num_rows, num_columns, entry_bytes, block_bytes):
        block = seen[rows, columns]
        block += 1
        assert 0 < block.numel() <= max(MIN_COLUMNS, block_bytes // entry_bytes)
    assert (seen == 1).all()


def test_the_example_of_the_docstring():
    blocks = list(table_blocks(40, 100, 1 << 10, 512 << 10))
    assert len(blocks) == 8 and blocks[1][0] == slice(5, 10)
    small = list(table_blocks(40, 100, 1 << 10, 64 << 10))
    assert small[:2] == [(slice(0, 1), slice(0, 64)), (slice(0, 1), slice(64, 128))]


@pytest.mark.parametrize("table", [[[3, 4, 5]], [[3, 5, 4]], [[3, 4], [5, 6]], [[0, 0], [6, 1]]])
def test_rows_are_taken_by_head_and_sequence(table):
    field, table = torch.randn(2, 7, 5, 3), torch.tensor(table)
    rows = take_rows("test rows", field, run_of(table), len(table))
    assert torch.equal(rows, field[:, table].flatten(0, 1))
    is_in_place = rows.untyped_storage().data_ptr() == field.untyped_storage().data_ptr()
    assert is_in_place == (table.tolist() == [[3, 4, 5]])
