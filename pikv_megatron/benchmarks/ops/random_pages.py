"""Caches of random numbers in every payload, and what they hold in float64.

Legend: ng KV heads, p pages, S tokens and R stored rows a page, hn head width, t tokens.
"""

from typing import NamedTuple

import torch

from pikv_megatron.benchmarks.ops.op_case import Grid
from pikv_megatron.ops.packing import unpack
from pikv_megatron.types import KVPages

PAYLOADS = ("float32", "bfloat16", "float16", "float8", "int8", "int4", "int3", "int2")
PLAIN = PAYLOADS[:3]
NUM_HEADS, NUM_GROUPS, HEAD_WIDTH = 32, 8, 128


class DenseCache(NamedTuple):
    """One sequence.

    Attributes:
        query: [np, hn].
        keys: [ng, t, hn].
        values: [ng, t, hn].
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def pages(self, page_size: int) -> KVPages:
        """The same memory as pages."""
        return KVPages(*[x.unflatten(1, (-1, page_size)) for x in (self.keys, self.values)])


def dense_cache(grid: Grid, num_tokens: int, dtype: torch.dtype, layer: int = 0) -> DenseCache:
    """Normal numbers; queries twice as large, so that attention prefers some tokens."""
    shape = (NUM_GROUPS, num_tokens, HEAD_WIDTH)
    first = 10 * layer
    query = grid.randn(NUM_HEADS, HEAD_WIDTH, key=first + 1) * 2
    keys, values = (grid.randn(*shape, dtype=dtype, key=first + key) for key in (2, 3))
    return DenseCache(query.to(dtype), keys, values)


def scaled_pages(grid: Grid, payload: str, num_pages: int, page_size: int) -> KVPages:
    """Random codes with one scale a page and channel (keys) or token (values)."""
    heads = (NUM_GROUPS, num_pages)
    bits = 8 if payload == "float8" else int(payload.removeprefix("int"))
    shape = (*heads, page_size * bits // 8, HEAD_WIDTH)
    scales = []
    for key, size in ((4, (1, HEAD_WIDTH)), (5, (page_size, 1))):
        scales.append(grid.randn(*heads, *size, key=key).abs().add(0.5).mul(3 / 2**bits).half())
    if payload == "float8":
        pools = [grid.randn(*shape, dtype=torch.float8_e4m3fn, key=key) for key in (6, 7)]
        return KVPages(*pools, scales[0].mul(85), None, scales[1].mul(85), None)
    pools = [grid.integers(256, *shape, key=key).to(torch.uint8) for key in (6, 7)]
    zeros = [torch.full_like(scale, -1.5) for scale in scales]
    return KVPages(*pools, scales[0], zeros[0], scales[1], zeros[1])


def plain_numbers(
    pages: KVPages, group: int, listed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages * S, hn] of one KV head, float64.

    Args:
        listed: page numbers.
    """
    fields = [None if x is None else x[group, listed] for x in pages[:6]]
    keys = _decode(fields[0], fields[2], fields[3], pages.key_bits, tokens_share=True)
    return keys, _decode(fields[1], fields[4], fields[5], pages.value_bits, tokens_share=False)


def _decode(stored, scale, zero, bits: int, tokens_share: bool) -> torch.Tensor:
    """x = q * scale + zero; groups are of tokens (keys) or of channels (values)."""
    if scale is None:
        return stored.double().flatten(0, 1)
    codes = stored if bits == 8 else unpack(stored, bits)
    numbers, dim = codes.double(), 1 if tokens_share else 2
    for apply, factor in ((numbers.mul_, scale), (numbers.add_, zero)):
        if factor is not None:
            apply(factor.double().repeat_interleave(numbers.shape[dim] // factor.shape[dim], dim))
    return numbers.flatten(0, 1)
