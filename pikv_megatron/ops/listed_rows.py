"""Rows that each sequence lists of a tensor over pages, gathered a block at a time.

Legend: n sequences, m rows listed for a sequence, ng KV heads, p rows, r sequences and b columns of
a block.
"""

from collections.abc import Iterator

import torch

from pikv_megatron.ops.workspace import scratch

# Fewer columns of a sequence are not worth a block's calls.
MIN_COLUMNS = 16


def table_blocks(
    num_rows: int, num_columns: int, entry_bytes: int, block_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """Sequences and columns of blocks whose entries take about `block_bytes` together.

    Example:
        40 by 100, entries of 1 KB, blocks of 512 KB: 8 blocks of 5 sequences. Blocks of 64 KB: a
        sequence is 2 blocks, columns 0 to 63 and 64 to 99.
    """
    entries = block_bytes // entry_bytes
    row_step = max(1, entries // max(1, num_columns))
    step = max(MIN_COLUMNS, entries // row_step)
    for first in range(0, num_rows, row_step):
        for column in range(0, num_columns, step):
            yield slice(first, first + row_step), slice(column, column + step)


def run_of(table: torch.Tensor) -> torch.Tensor | slice:
    """The pages [r * b] of a block [r, b] of a table; the slice that names the same pages for one
    sequence, on a CPU, whose pages lie one behind the other."""
    pages = table.reshape(-1)
    if pages.is_cpu and len(table) == 1:
        first, last = int(pages[0]), int(pages[-1])
        if last - first == pages.numel() - 1:
            if torch.equal(pages, torch.arange(first, last + 1)):
                return slice(first, last + 1)
    return pages


def take_rows(
    name: str, field: torch.Tensor, pages: torch.Tensor | slice, num_rows: int
) -> torch.Tensor:
    """Rows `pages` [r * b] of a field [ng, p, ...] as [ng * r, b, ...], r being `num_rows`.

    A slice of one sequence is read where it lies; what is gathered is valid until the next call
    with this name.
    """
    if isinstance(pages, slice):
        return _by_sequence(field[:, pages], num_rows)
    shape = field.shape[0], len(pages), *field.shape[2:]
    rows = scratch(name, shape, field.dtype, field.device)
    return _by_sequence(torch.index_select(field, 1, pages, out=rows), num_rows)


def _by_sequence(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return rows if num_rows == 1 else rows.unflatten(1, (num_rows, -1)).flatten(0, 1)
