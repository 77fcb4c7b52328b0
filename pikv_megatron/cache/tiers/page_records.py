"""Pages as records: rows of bytes, whatever they store and in however many bits.

A page that leaves the device, and comes back, is moved as it is packed: field by field, one behind
the other, unchanged.

Legend: ng KV heads, p pages of a pool, c some of them, B bytes of a record.
"""

import torch

from pikv_megatron.types import KVPages

WORD = 8  # bytes; a record is of whole words


def record_bytes(pages: KVPages) -> int:
    """B."""
    own = sum(t.shape[0] * t.shape[2] for t in map(_as_bytes, pages.tensors))
    return -(-own // WORD) * WORD


def to_records(pages: KVPages, places: torch.Tensor) -> torch.Tensor:
    """The pages at places [c] as records [c, B], uint8."""
    fields = [t.index_select(1, places).transpose(0, 1) for t in map(_as_bytes, pages.tensors)]
    filled = sum(t.shape[1] * t.shape[2] for t in fields)
    rest = fields[0].new_zeros(len(places), record_bytes(pages) - filled)
    return torch.cat([*(t.flatten(1) for t in fields), rest], dim=1)


def from_records(records: torch.Tensor, pages: KVPages, places: torch.Tensor) -> None:
    """Write records [c, B] to places [c] of pages; the inverse of `to_records`."""
    first = 0
    for field in map(_as_bytes, pages.tensors):
        heads, _, width = field.shape
        part = records[:, first : first + heads * width].unflatten(1, (heads, width))
        field.index_copy_(1, places, part.transpose(0, 1))
        first += heads * width


def _as_bytes(field: torch.Tensor) -> torch.Tensor:
    """A view [ng, p, bytes] of a field of pages, [ng, p, ...], or [p] of all heads together."""
    if field.dim() == 1:
        field = field.view(1, -1, 1)
    return field.flatten(2).view(torch.uint8)
