"""Tensors as the integers that the C++ kernels read."""

from typing import Any

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
# Of bytes, by the numbers that each holds.
BYTE_TYPES = {1: 4, 2: 5, 4: 6}


def address(tensor: torch.Tensor | None) -> int:
    """Of the first number; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def pool_fields(pool: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of a tensor [ng, p], [ng, p, w] or [ng, p, R, w]."""
    if pool is None:
        return 0, 0, 0, 0
    strides = pool.stride()
    assert len(strides) == 2 or strides[-1] == 1, "channels must lie together"
    return pool.data_ptr(), *strides[:2], strides[2] if len(strides) == 4 else 0


def row_fields(table: torch.Tensor) -> tuple[int, int]:
    """Address and stride of a tensor [n, m] whose columns lie together."""
    assert table.stride(1) == 1 or table.shape[1] < 2, "columns must lie together"
    return table.data_ptr(), table.stride(0)


def page_fields(pages: Any) -> list[int]:
    """Of `KVPages`."""
    keys, values, key_scale, value_scale = (
        pages.keys, pages.values, pages.key_scale, pages.value_scale
    )
    is_bytes = keys.dtype == torch.uint8
    fields = [
        BYTE_TYPES[pages.tokens_per_row] if is_bytes else TYPES[keys.dtype],
        pages.page_size, keys.shape[2], keys.shape[3], values.shape[3],
        1 if key_scale is None else key_scale.shape[2],
        1 if value_scale is None else value_scale.shape[3],
    ]
    for pool in pages[:6]:
        fields += pool_fields(pool)
    return fields + [address(pages.log_multiplicity)]
