"""Tensors as the integers that the C++ kernels read."""

from typing import Any

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
# Of bytes, by the bits of a number.
BYTE_TYPES = {8: 4, 4: 5, 3: 6, 2: 7}
# Of values that are columns of the keys: a type that there is not, and fields that are not read.
NO_SIDE = [-1] + [0] * 15


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
    """Of `KVPages`, noted in it: a pool is asked for them in every layer of every step."""
    noted = vars(pages)
    if "fields" not in noted:
        size = pages.page_size
        keys = side_fields(
            pages.keys, pages.key_scale, pages.key_zero, size, _length(pages.key_scale, 2)
        )
        if pages.values is None:
            values = NO_SIDE
        else:
            values = side_fields(
                pages.values, pages.value_scale, pages.value_zero, size,
                _length(pages.value_scale, 3),
            )
        noted["fields"] = keys + values + [address(pages.log_multiplicity)]
    return noted["fields"]


def side_fields(
    numbers: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, page_size: int,
    num_scales: int,
) -> list[int]:
    """Of keys or values; `num_scales` of a channel, or of a token."""
    kind = numbers.dtype
    is_bytes = kind == torch.uint8
    fields = [
        BYTE_TYPES[8 * numbers.shape[2] // page_size] if is_bytes else TYPES[kind],
        page_size, numbers.shape[3], num_scales,
    ]
    for pool in (numbers, scale, zero):
        fields += pool_fields(pool)
    return fields


def _length(scale: torch.Tensor | None, dim: int) -> int:
    return 1 if scale is None else scale.shape[dim]
