"""Pools inside larger poisoned allocations, and the sketches and pages made of them."""

from typing import NamedTuple

import hypothesis.strategies as st
import torch
from payloads import PAYLOADS, PLAIN, bits_of, sides, together

from pikv_megatron.types import (
    BoundingBoxSketch,
    KVPages,
    LowRankSketch,
    MeanKeySketch,
    PageSketch,
    SharedRow,
)

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SKETCHES = ("mean", "box", "low rank 2", "low rank 4")


class Guarded(NamedTuple):
    """A view of a larger allocation whose bytes were all 255: NaN for every floating dtype."""

    whole: torch.Tensor
    view: torch.Tensor

    def assert_rest_untouched(self, pages: torch.Tensor) -> None:
        """Only view[:, pages], and the null page, may differ from the poison."""
        integers = self.view.view(self.whole.dtype)
        rest = torch.ones(integers.shape[1], dtype=torch.bool)
        rest[pages[pages >= 0].cpu()] = False
        rest[-1] = False
        poison = poison_of(self.whole.dtype)
        num_inside = int((integers != poison).sum())
        assert int((self.whole != poison).sum()) == num_inside, "wrote outside of the pool"
        assert bool((integers[:, rest] == poison).all()), "wrote to a page that was not named"


def poison_of(dtype: torch.dtype) -> int:
    return 255 if dtype == torch.uint8 else -1


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device="cpu") -> Guarded:
    """Poisoned memory of this shape with more on every side."""
    integer = INTEGERS[dtype.itemsize]
    whole = torch.full([s + 2 for s in shape], poison_of(integer), dtype=integer, device=device)
    inner = whole[tuple(slice(1, s + 1) for s in shape)]
    return Guarded(whole, inner.view(dtype))


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a strided view with NaN around it."""
    view = guarded(tuple(x.shape), x.dtype, x.device).view
    view.copy_(x)
    return view


class PageSpec(NamedTuple):
    """Shapes of a seal: pages of `payload`, and what is sketched of them."""

    payload: str
    num_groups: int
    num_items: int
    page_size: int
    key_width: int
    value_width: int
    key_groups: int
    value_groups: int
    sketch: str
    dtype: torch.dtype
    seed: int
    is_shared: bool = False  # values are columns of the keys


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def page_specs(draw, page_sizes=(1, 3, 8, 12, 16, 63, 64, 500), max_groups=4) -> PageSpec:
    payload, sketch = draw(st.sampled_from(PAYLOADS)), draw(st.sampled_from(SKETCHES))
    step = max(together(payload), {"2": 4, "4": 2}.get(sketch[-1], 1))
    page_size = draw(st.sampled_from([s for s in page_sizes if s % step == 0]))
    widths = st.sampled_from([16, 20, 33, 64, 80, 128, 256] if page_size < 100 else [16, 33])
    value_width = draw(widths)
    return PageSpec(
        payload, draw(st.integers(1, max_groups)), draw(st.integers(0, 3)), page_size,
        draw(widths), value_width, draw(st.sampled_from(divisors(page_size)[:4])),
        draw(st.sampled_from(divisors(value_width)[:4])), sketch,
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        draw(st.integers(0, 10**6)), draw(st.integers(0, 3)) == 0,
    )


class SealCase(NamedTuple):
    """Inputs of `seal_page`; outputs are poisoned."""

    keys: torch.Tensor
    values: torch.Tensor | None
    page: torch.Tensor
    residual: torch.Tensor


def seal_case(spec: PageSpec, num_pages: int, device="cpu") -> SealCase:
    """Buffers of very different offsets and ranges; the middle item is lost."""
    rng = torch.Generator().manual_seed(spec.seed)
    shape = (spec.num_groups, spec.num_items, spec.page_size)
    buffers = []
    for width in (spec.key_width, spec.value_width):
        x = torch.randn(*shape, width, generator=rng)
        size = 10.0 ** torch.randint(-4, 3, (width,), generator=rng)
        offset = torch.randn(width, generator=rng) * 20
        x = x * size + offset * (torch.rand(width, generator=rng) < 0.5)
        x[..., 0] = offset[0]  # a channel without any range
        buffers.append(poisoned(x.to(device, spec.dtype)))
    page = torch.randperm(num_pages - 1, generator=rng)[: spec.num_items]
    page[1:2] = -1
    residual = torch.rand(spec.num_groups, spec.num_items, generator=rng)
    if spec.is_shared:
        buffers[1] = None
    return SealCase(*buffers, page.to(device), residual.to(device))


def empty_pages(
    spec: PageSpec, num_pages: int, device="cpu"
) -> tuple[KVPages, list[Guarded]]:
    """A poisoned pool."""
    heads, size = (spec.num_groups, num_pages), spec.page_size
    key, value = sides(spec.payload)
    keys = _empty_side(key, heads, size, spec.key_width, (spec.key_groups, spec.key_width), device)
    if spec.is_shared:
        fields = [None if pool is None else pool.view for pool in keys]
        pages = KVPages(fields[0], None, *fields[1:], shared=SharedRow(size, spec.key_width))
        return pages, [pool for pool in keys if pool is not None]
    values = _empty_side(value, heads, size, spec.value_width, (size, spec.value_groups), device)
    fields = [None if pool is None else pool.view for pool in (
        keys[0], values[0], *keys[1:], *values[1:]
    )]
    return KVPages(*fields), [pool for pool in (*keys, *values) if pool is not None]


def _empty_side(
    side: str, heads: tuple[int, int], page_size: int, width: int, scales: tuple[int, int], device
) -> tuple[Guarded | None, ...]:
    """Numbers, scales and zero points of keys, or of values."""
    if side in PLAIN:
        return guarded((*heads, page_size, width), getattr(torch, side), device), None, None
    dtype = torch.float8_e4m3fn if side == "float8" else torch.uint8
    numbers = guarded((*heads, page_size * bits_of(side) // 8, width), dtype, device)
    scale, zero = (guarded((*heads, *scales), torch.float16, device) for _ in range(2))
    return numbers, scale, None if side == "float8" else zero


def empty_sketch(
    kind: str, num_groups: int, num_pages: int, page_size: int, width: int, dtype: torch.dtype,
    device="cpu",
) -> tuple[PageSketch, list[Guarded]]:
    """A poisoned sketch of every page."""
    heads = (num_groups, num_pages)
    if kind == "mean":
        pools = [guarded((*heads, width), dtype, device)]
        return MeanKeySketch(pools[0].view), pools
    if kind == "box":
        pools = [guarded((*heads, width), dtype, device) for _ in range(2)]
        return BoundingBoxSketch(pools[0].view, pools[1].view), pools
    rows = page_size * int(kind[-1]) // 8
    pools = [
        guarded((*heads, rows, width), torch.uint8, device),
        guarded((*heads, width), torch.float16, device),
        guarded((*heads, width), torch.float16, device),
        guarded(heads, torch.float32, device),
    ]
    return LowRankSketch(*[pool.view for pool in pools], page_size), pools
