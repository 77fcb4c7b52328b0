"""Reads listed pages as numbers to multiply, a block of columns at a time, on a CPU.

Legend: n sequences, ng KV heads, m pages listed for a sequence, c pages of a block, S tokens and
R stored rows a page, t = c * S, r a stored width, G scales of a page.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from pikv_megatron.ops.packing import float8_numbers, unpack
from pikv_megatron.ops.workspace import scratch
from pikv_megatron.types import PageList

Found = TypeVar("Found")


class PageBlock(NamedTuple):
    """Columns of a page list.

    Attributes:
        columns: which ones.
        pages: [n, c], their page numbers; for pages that are not read at all, where that is
            possible, one of the sequence's that is.
        run: the number of the first listed page if all listed pages lie one behind the other.
        hidden: [n, t], bool, True for tokens that are not to be read; None: all of them are.
        is_clean: values of what is hidden are finite, so a weight of 0 makes them harmless.
    """

    columns: slice
    pages: torch.Tensor
    run: int | None
    hidden: torch.Tensor | None
    is_clean: bool


def noted(page_list: PageList, key: object, find: Callable[[], Found]) -> Found:
    """What `find` returns, from the list's notes where it was found before."""
    if page_list.notes is None:
        return find()
    if key not in page_list.notes:
        page_list.notes[key] = find()
    return page_list.notes[key]


def page_blocks(page_list: PageList, block_tokens: int) -> list[PageBlock]:
    """The blocks of a page list, of about `block_tokens` tokens a sequence."""
    is_plain = page_list.pages.keys.dtype == page_list.pages.values.dtype == torch.float32
    return noted(
        page_list, (block_tokens, is_plain),
        lambda: list(_find_blocks(page_list, block_tokens, is_plain)),
    )


def row_columns(page_list: PageList) -> tuple[int, ...]:
    """Columns up to the last that each sequence reads, from a CPU's tensors.

    Example:
        lens 64, 0, 5, 0 and 0, 0, 0, 0: 3 and 0.
    """
    n, m = page_list.lens.shape
    if m == 0:
        return (0,) * n
    number = torch.arange(1, m + 1, dtype=torch.int32)
    return tuple(((page_list.lens > 0) * number).amax(dim=1).tolist())


def token_bytes(page_list: PageList) -> int:
    """Of a token's keys or values of all KV heads, as float32."""
    keys, values = page_list.pages.keys, page_list.pages.values
    return 4 * keys.shape[0] * max(keys.shape[3], values.shape[3])


def _find_blocks(page_list: PageList, block_tokens: int, is_plain: bool) -> Iterator[PageBlock]:
    table, page_size = page_list.table, page_list.pages.page_size
    if table.numel() == 0:
        return
    num_columns, run, num_whole = table.shape[1], None, 0
    has_hidden: list[bool] | None = [True] * num_columns
    if table.is_cpu:
        run = _first_of_run(table.reshape(-1))
        has_hidden = _has_hidden(page_list)
        if run is not None and is_plain:
            # Nothing is copied up to the first hidden token, so one block will do.
            num_whole = has_hidden.index(True) if has_hidden else num_columns
    needs_stand_ins = run is None and has_hidden and not page_list.is_finite
    stand_ins = _stand_ins(page_list) if needs_stand_ins else None
    table = table if stand_ins is None else stand_ins
    step = max(1, block_tokens // page_size)
    bounds = [0] * (num_whole > 0) + list(range(num_whole, num_columns, step))
    for first, last in zip(bounds, bounds[1:] + [num_columns]):
        columns = slice(first, last)
        is_hidden = has_hidden is not None and any(has_hidden[columns])
        hidden = _hidden(page_list, columns) if is_hidden else None
        is_clean = hidden is None or stand_ins is not None or page_list.is_finite
        yield PageBlock(columns, table[:, columns], run, hidden, is_clean)


def read_keys(page_list: PageList, block: PageBlock) -> list[torch.Tensor]:
    """Keys [r_k, t], float32, as the operands of a product: see `_operands`.

    What is hidden may hold anything.
    """
    pages = page_list.pages
    if block.run is not None and pages.keys.dtype == torch.float32:
        key = "keys", block.columns.start, pages.keys.data_ptr()
        return noted(
            page_list, key, lambda: _operands(_stored(pages.keys, page_list, block), True)
        )
    if pages.key_scale is None:
        stored = _stored(pages.keys, page_list, block)
        return _operands(_as_type(stored, torch.float32), True)
    numbers = read_codes(pages.keys, pages.key_bits, page_list, block)
    groups = numbers.unflatten(3, (pages.key_scale.shape[2], -1))
    for apply, factor in ((groups.mul_, pages.key_scale), (groups.add_, pages.key_zero)):
        if factor is not None:
            apply(listed_scales(factor, block).unsqueeze(4))
    return _operands(numbers, True)


def read_values(
    page_list: PageList, block: PageBlock, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Values [t, r_v] as the operands of a product: see `_operands`.

    What is hidden becomes 0 where it may be anything, since 0 times NaN would be NaN.

    Args:
        dtype: plain pages of this type are not converted; all others become float32.
    """
    pages = page_list.pages
    if block.run is not None and block.is_clean and pages.values.dtype == dtype:
        key = "values", block.columns.start, pages.values.data_ptr()
        return noted(
            page_list, key, lambda: _operands(_stored(pages.values, page_list, block), False)
        )
    if pages.value_scale is None:
        stored = _stored(pages.values, page_list, block)
        is_pool = block.run is not None
        dtype = dtype if stored.dtype == dtype else torch.float32
        numbers = _as_type(stored, dtype, copies=is_pool and not block.is_clean)
    else:
        numbers = read_codes(pages.values, pages.value_bits, page_list, block)
        groups = numbers.unflatten(4, (pages.value_scale.shape[3], -1))
        for apply, factor in ((groups.mul_, pages.value_scale), (groups.add_, pages.value_zero)):
            if factor is not None:
                apply(listed_scales(factor, block).unsqueeze(5))
    if not block.is_clean:
        numbers.flatten(2, 3).masked_fill_(block.hidden.unsqueeze(-1), 0.0)
    return _operands(numbers, False)


def read_codes(
    pool: torch.Tensor, bits: int, page_list: PageList, block: PageBlock
) -> torch.Tensor:
    """Scaled numbers of a pool [ng, p, R, r] before they are scaled: [ng, n, c, S, r], float32."""
    stored = _stored(pool, page_list, block)
    num_tokens = stored.shape[3] * 8 // bits
    shape = *stored.shape[:3], num_tokens, stored.shape[4]
    numbers = scratch("page numbers", shape, torch.float32, stored.device)
    if stored.dtype == torch.float8_e4m3fn:
        wide = scratch("wide codes", shape, torch.int16, stored.device)
        return float8_numbers(stored, wide, numbers)
    if bits < 8:
        stored = unpack(stored, bits, scratch("codes", shape, torch.uint8, stored.device))
    return numbers.copy_(stored)


def listed_scales(pool: torch.Tensor, block: PageBlock) -> torch.Tensor:
    """Scales or zero points [ng, p, ...] -> [ng, n, c, ...], float32."""
    return pool.index_select(1, block.pages.reshape(-1)).float().unflatten(1, block.pages.shape)


def _operands(numbers: torch.Tensor, transposes: bool) -> list[torch.Tensor]:
    """[ng, n, c, S, r] as one operand [ng * n, t, r], or one [n, t, r] for each head of a pool
    whose heads lie apart; transposed where asked."""
    heads = numbers.flatten(2, 3)
    if heads.shape[1] == 1 or heads.stride(0) == heads.shape[1] * heads.stride(1):
        parts = [heads.flatten(0, 1)]
    else:
        parts = list(heads.unbind(0))
    return [part.transpose(1, 2) for part in parts] if transposes else parts


def _first_of_run(pages: torch.Tensor) -> int | None:
    first, last = int(pages[0]), int(pages[-1])
    if last - first != pages.numel() - 1:
        return None
    return first if torch.equal(pages, torch.arange(first, last + 1)) else None


def _has_hidden(page_list: PageList) -> list[bool] | None:
    """[m], True where a page of the column is not read as a whole; None where every page is."""
    partial = page_list.lens < page_list.pages.page_size
    if page_list.token_mask is not None:
        partial |= ~page_list.token_mask.all(2)
    return partial.any(0).tolist() if partial.any() else None


def _stand_ins(page_list: PageList) -> torch.Tensor | None:
    """The table with pages that are not read replaced by the first of the sequence's that is.

    None where a page is read in part, or a sequence reads no page, or the device would be asked.

    Example:
        Pages 7, 3, 9, the last one with lens 0: 7, 3, 7.
    """
    lens, table = page_list.lens, page_list.table
    if page_list.token_mask is not None or not table.is_cpu:
        return None
    is_whole = lens == page_list.pages.page_size
    if not (is_whole.any(1).all() and (is_whole | (lens == 0)).all()):
        return None
    first = table.gather(1, is_whole.int().argmax(dim=1, keepdim=True))
    return torch.where(is_whole, table, first)


def _hidden(page_list: PageList, columns: slice) -> torch.Tensor:
    lens = page_list.lens[:, columns].unsqueeze(-1)
    hidden = torch.arange(page_list.pages.page_size, device=lens.device) >= lens
    if page_list.token_mask is not None:
        hidden |= ~page_list.token_mask[:, columns]
    return hidden.flatten(1)


def _stored(pool: torch.Tensor, page_list: PageList, block: PageBlock) -> torch.Tensor:
    """[ng, n, c, R, r]: a view of the pool [ng, p, R, r] where that is possible."""
    n, m = page_list.table.shape
    if block.run is not None:
        return pool[:, block.run : block.run + n * m].unflatten(1, (n, m))[:, :, block.columns]
    pages, (num_groups, num_pages) = block.pages.reshape(-1), pool.shape[:2]
    out = scratch(
        "stored pages", (num_groups, pages.numel(), *pool.shape[2:]), pool.dtype, pool.device
    )
    gathered = out.unflatten(1, block.pages.shape)
    if pool.stride(0) == num_pages * pool.stride(1):
        # Torch gathers with several threads along the first dimension only.
        first = torch.arange(0, num_groups * num_pages, num_pages, device=pages.device)
        pages = (first.unsqueeze(1) + pages).reshape(-1)
        pool, out = pool.flatten(0, 1), out.flatten(0, 1)
    if pool.dtype.itemsize == 1:
        # As bytes: float8 has few operations.
        pool, out = pool.view(torch.uint8), out.view(torch.uint8)
    torch.index_select(pool, pool.dim() - 3, pages, out=out)
    return gathered


def _as_type(stored: torch.Tensor, dtype: torch.dtype, copies: bool = False) -> torch.Tensor:
    if stored.dtype == dtype and not copies:
        return stored
    return scratch("page numbers", stored.shape, dtype, stored.device).copy_(stored)
