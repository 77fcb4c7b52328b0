"""What travels, as bytes: rows of several tensors side by side, so that one collective carries all.

Legend: t rows.
"""

from collections.abc import Sequence

import torch


def pack_rows(fields: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [t, ...] of any types -> [t, bytes of a row], uint8."""
    flat = [_as_matrix(field).contiguous().view(torch.uint8) for field in fields]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def unpack_rows(rows: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `pack_rows`; types and shapes but for t are those of `like`."""
    sizes = [_row_numel(field) * field.dtype.itemsize for field in like]
    parts = [rows] if len(like) == 1 else [_aligned(part) for part in rows.split(sizes, dim=1)]
    return [
        part.view(field.dtype).view(len(rows), *field.shape[1:])
        for part, field in zip(parts, like)
    ]


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """[..., x], bool -> [..., x / 32 rounded up], int32, flag i is bit i % 32 of word i // 32.

    Example:
        True, False, True: one word, 5.
    """
    words = -(-flags.shape[-1] // 32)
    padded = flags.new_zeros(*flags.shape[:-1], words * 32)
    padded[..., : flags.shape[-1]] = flags
    bit = 1 << torch.arange(32, device=flags.device)
    packed = (padded.unflatten(-1, (words, 32)) * bit).sum(dim=-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def unpack_bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` flags of words [..., x / 32], int32 -> [..., count], bool."""
    bit = torch.arange(32, device=words.device)
    flags = (words.long().unsqueeze(-1) >> bit) & 1
    return flags.flatten(-2)[..., :count].bool()


def _aligned(part: torch.Tensor) -> torch.Tensor:
    """A copy in its own memory: torch calls a part of a single row contiguous where it lies."""
    return part.clone(memory_format=torch.contiguous_format)


def _as_matrix(field: torch.Tensor) -> torch.Tensor:
    return field.reshape(len(field), _row_numel(field))


def _row_numel(field: torch.Tensor) -> int:
    return field.shape[1:].numel()
