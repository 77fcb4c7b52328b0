"""How numbers of a page are packed.

Legend: ng KV heads, S tokens a page, r_k and r_v stored widths, G_k and G_v scales.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from pikv_megatron.options import Options
from pikv_megatron.types import KVPages, KVShape


class FormatOptions(Options):
    """Parameters of a format. `ops.seal_page` and `ops.decode_attention` read off the pages how
    they are packed, so a format is its allocation."""

    def check(self, page_size: int) -> None:
        """Refuse a page size that cannot be packed.

        Raises:
            ValueError: names both.
        """

    @abstractmethod
    def allocate(self, kv: KVShape, num_pages: int, page_size: int) -> KVPages:
        """An empty pool; `kv` has the stored widths."""


class ScaledOptions(FormatOptions):
    """Codes of `bits` bits with scales and zero points (KIVI, arXiv 2402.02750): keys have one a
    channel and group of tokens, values one a token and group of channels.

    Attributes:
        bits: of a code.
    """

    bits: ClassVar[int]

    key_group: int = Field(32, ge=1, description="tokens of a page that share a scale of keys")
    value_group: int = Field(64, ge=1, description="channels that share a scale of values")

    def check(self, page_size):
        per_byte = 8 // self.bits
        if page_size % per_byte:
            raise ValueError(
                f"codec.format {self.name} packs {per_byte} tokens into a byte: page_size "
                f"{page_size} must be a multiple of {per_byte}"
            )

    def allocate(self, kv, num_pages, page_size):
        ng, device = kv.num_groups, kv.device
        rows = page_size * self.bits // 8
        key_groups = _num_groups(page_size, self.key_group)
        value_groups = _num_groups(kv.value_width, self.value_group)

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros(ng, num_pages, *shape, dtype=dtype, device=device)

        return KVPages(
            zeros(rows, kv.key_width, dtype=torch.uint8),
            zeros(rows, kv.value_width, dtype=torch.uint8),
            *(zeros(key_groups, kv.key_width) for _ in range(2)),
            *(zeros(page_size, value_groups) for _ in range(2)),
        )


def _num_groups(size: int, group: int) -> int:
    """Fewest equal groups of `size` that are no larger than `group`.

    Example:
        48 in groups of at most 32: two groups of 24.
    """
    return next(count for count in range(-(-size // group), size + 1) if size % count == 0)
