"""Drawn inputs of `decode_attention`: whatever it should not read is NaN or infinite."""

from typing import NamedTuple

import hypothesis.strategies as st
import torch
from oracle import is_read
from payloads import PAYLOADS, PLAIN, bits_of, sides, together

from pikv_megatron.ops.turn_keys import angle_table
from pikv_megatron.types import KeyTurn, KVPages, PageList, SharedRow

GUARD = 2


class ListSpec(NamedTuple):
    """One page list of a case."""

    payload: str
    page_size: int
    num_columns: int
    key_groups: int
    value_groups: int
    has_mask: bool = False
    has_bias: bool = False
    has_multiplicity: bool = False
    is_run: bool = False
    is_full: bool = False
    is_turned: bool = False


class CaseSpec(NamedTuple):
    """The shapes of a case; its numbers follow from the seed."""

    n: int
    sq: int
    num_groups: int
    group: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    lists: tuple[ListSpec, ...]
    seed: int = 0
    is_shared: bool = False  # values are the first columns of the keys


class Case(NamedTuple):
    """Arguments of `decode_attention`, and the allocations that the pools are views of."""

    query: torch.Tensor
    lists: list[PageList]
    softmax_scale: float
    allocations: list[torch.Tensor]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def list_specs(draw, value_width: int, max_tokens: int, payloads=PAYLOADS) -> ListSpec:
    payload = draw(st.sampled_from(payloads))
    step = together(payload)
    page_size = draw(st.sampled_from([s for s in (1, 3, 4, 8, 16, 63, 64) if s % step == 0]))
    return ListSpec(
        payload, page_size,
        draw(st.integers(0, max(1, max_tokens // page_size))),
        draw(st.sampled_from(divisors(page_size))),
        draw(st.sampled_from(divisors(value_width))),
        *draw(st.tuples(*[st.booleans()] * 6)),
    )


@st.composite
def case_specs(draw, max_tokens: int, payloads=PAYLOADS) -> CaseSpec:
    group = draw(st.integers(1, 16))
    widths = st.sampled_from([16, 48, 63, 64, 80, 96, 128, 256])
    value_width, key_width = draw(widths), draw(widths)
    lists = st.lists(list_specs(value_width, max_tokens, payloads), min_size=1, max_size=3)
    return CaseSpec(
        draw(st.integers(0, 3)), draw(st.integers(1, 3)),
        draw(st.integers(1, 4)), group, key_width, value_width,
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        tuple(draw(lists)), draw(st.integers(0, 10**6)),
        value_width <= key_width and draw(st.booleans()),
    )


def build(spec: CaseSpec, device: torch.device = torch.device("cpu")) -> Case:
    """The case with its numbers."""
    rng = torch.Generator().manual_seed(spec.seed)
    num_heads = spec.num_groups * spec.group
    query = torch.randn(spec.n, spec.sq, num_heads, spec.key_width, generator=rng)
    allocations: list[torch.Tensor] = []
    lists = [_page_list(spec, each, rng, allocations, device) for each in spec.lists]
    return Case(query.to(device, spec.dtype), lists, spec.key_width**-0.5, allocations)


def _page_list(spec, each: ListSpec, rng, allocations, device) -> PageList:
    n, m, size = spec.n, each.num_columns, each.page_size
    num_pages = max(1, n * m if each.is_run else m + 2)
    if each.is_run:
        table = torch.arange(n * m).view(n, m)
    else:
        orders = [torch.randperm(num_pages, generator=rng)[:m] for _ in range(n)]
        table = torch.stack(orders) if n else torch.zeros(0, m, dtype=torch.int64)
    lens = torch.randint(0, size + 1, (n, m), generator=rng)
    whole = torch.rand(n, m, generator=rng)
    lens = torch.where(whole < 0.5, size, torch.where(whole < 0.7, 0, lens)).int()
    if each.is_full:
        lens.fill_(size)
    elif n > 1:
        lens[-1] = 0
    mask = torch.rand(n, m, size, generator=rng) < 0.7 if each.has_mask else None
    bias = None
    if each.has_bias:
        bias = torch.randn(n, spec.sq, spec.num_groups * spec.group, generator=rng)
    empty = KVPages(torch.zeros(1, 1, size, 1), torch.zeros(1, 1, size, 1))
    read = is_read(PageList(empty, table, lens, mask))
    used = torch.zeros(num_pages, size, dtype=torch.bool)
    used.index_put_((table[..., None], torch.arange(size)), read, accumulate=True)
    pages = _pages(spec, each, used, rng)
    pages = KVPages(
        *[_guarded(x, allocations, device) for x in pages[:-1]], shared=pages.shared
    )
    table, lens, mask, bias = (x if x is None else x.to(device) for x in (table, lens, mask, bias))
    return PageList(pages, table, lens, mask, bias, _turn(spec, each, table, rng, device))


def _turn(spec: CaseSpec, each: ListSpec, table: torch.Tensor, rng, device) -> KeyTurn | None:
    """Of all channels of the keys, or of half of them; positions lie elsewhere than the pages."""
    if not each.is_turned or spec.is_shared:
        return None
    width = spec.key_width // (2 + spec.seed % 2 * 2)
    num_rows = 3 + (int(table.max()) if table.numel() else 0)
    position = torch.randint(0, 5000, (num_rows, each.page_size), generator=rng)
    angles = angle_table(torch.rand(width, generator=rng), 5000)
    parts = position.int(), num_rows - 1 - table, angles
    return KeyTurn(*(x.to(device) for x in parts))


def _pages(spec: CaseSpec, each: ListSpec, used: torch.Tensor, rng) -> KVPages:
    """Random pages; tokens that are not `used` [p, S] are poisoned."""
    num_pages, size = used.shape
    multiplicity = None
    if each.has_multiplicity:
        multiplicity = torch.randint(1, 5, (num_pages,), generator=rng).float().log()
        multiplicity[~used.any(1)] = torch.nan
    groups = used.view(num_pages, each.key_groups, -1).any(2)
    key, value = sides(each.payload)
    keys = _side(
        key, (spec.num_groups, num_pages, size, spec.key_width),
        (each.key_groups, spec.key_width), used, groups, rng,
    )
    if spec.is_shared:
        row = SharedRow(size, spec.value_width)
        return KVPages(keys[0], None, *keys[1:], None, None, multiplicity, row)
    values = _side(
        value, (spec.num_groups, num_pages, size, spec.value_width), (size, each.value_groups),
        used, used, rng,
    )
    return KVPages(keys[0], values[0], *keys[1:], *values[1:], multiplicity)


def _side(
    side: str, shape: tuple[int, ...], scales: tuple[int, int], used: torch.Tensor,
    used_scales: torch.Tensor, rng,
) -> tuple[torch.Tensor | None, ...]:
    """Numbers, scales and zero points of keys, or of values [ng, p, S, r]."""
    if side in PLAIN:
        numbers = torch.randn(shape, generator=rng).to(getattr(torch, side))
        return _poison(numbers, used), None, None
    bits, is_float8 = bits_of(side), side == "float8"
    if is_float8:
        numbers = _poison(torch.randn(shape, generator=rng), used).to(torch.float8_e4m3fn)
    else:
        packed = (*shape[:2], shape[2] * bits // 8, shape[3])
        numbers = torch.randint(0, 256, packed, generator=rng).to(torch.uint8)
    step = 1.0 if is_float8 else 3.0 / 2**bits
    scale = ((torch.rand(*shape[:2], *scales, generator=rng) + 0.5) * step).half()
    zero = torch.randn(*shape[:2], *scales, generator=rng).sub(1.5).half()
    _poison(scale, used_scales)
    _poison(zero, used_scales)
    return numbers, scale, None if is_float8 else zero


def _poison(pool: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Put NaN and infinity where [ng, p, rows, :] is not used [p, rows]."""
    pool.masked_fill_(~used[None, :, :, None], torch.nan)
    if pool.shape[3] > 1:
        pool[..., ::7].masked_fill_(~used[None, :, :, None], torch.inf)
    return pool


def _guarded(pool: torch.Tensor | None, allocations, device) -> torch.Tensor | None:
    """The same numbers as a view of a poisoned allocation with `GUARD` more pages at either end."""
    if pool is None:
        return None
    dim = 0 if pool.dim() == 1 else 1
    shape = list(pool.shape)
    shape[dim] += 2 * GUARD
    whole = torch.full(shape, 255, dtype=torch.uint8, device=device)
    if pool.dtype != torch.uint8:
        whole = torch.full(shape, torch.nan, device=device).to(pool.dtype)
    view = whole.narrow(dim, GUARD, pool.shape[dim])
    view.copy_(pool)
    allocations.append(whole)
    return view
