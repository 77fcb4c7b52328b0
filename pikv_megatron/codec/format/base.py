"""How numbers of a page are packed.

Legend: ng KV heads, p pages, S tokens a page, r_k and r_v stored widths, G_k and G_v scales.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pikv_megatron.codec.wire import WireSide
from pikv_megatron.options import Options
from pikv_megatron.types import KVPages, KVShape, SharedRow


class Packed(NamedTuple):
    """Empty keys, or values, of a pool: fields of `KVPages`."""

    numbers: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


class Older(NamedTuple):
    """How pages that are not among the newest are stored.

    Attributes:
        young: newest pages of a shard, which are not.
        format: of the others.
    """

    young: int
    format: "FormatOptions"


class FormatOptions(Options):
    """Parameters of a format. `ops.seal_page` and `ops.decode_attention` read off the pages how
    they are packed, so a format is its allocation."""

    @property
    def older(self) -> Older | None:
        """How older pages are stored; None: as they were sealed."""
        return None

    def wire_values(self, width: int) -> WireSide | None:
        """How values of a width travel as their pages will store them; None: as computed."""
        return None

    @property
    def is_packed(self) -> tuple[bool, bool]:
        """Whether keys and values take fewer bits than computed ones."""
        return False, False

    @property
    def parts(self) -> tuple["FormatOptions", ...]:
        """The formats of pages of all ages."""
        return (self,)

    def check(self, page_size: int) -> None:
        """Refuse a page size that cannot be packed.

        Raises:
            ValueError: names both.
        """

    @abstractmethod
    def packed_keys(self, kv: KVShape, num_pages: int, page_size: int) -> Packed:
        """Room for keys; `kv` has the stored widths."""

    @abstractmethod
    def packed_values(self, kv: KVShape, num_pages: int, page_size: int) -> Packed:
        """Room for values."""

    def allocate(self, kv: KVShape, num_pages: int, page_size: int) -> KVPages:
        """An empty pool; `kv` has the stored widths."""
        keys = self.packed_keys(kv, num_pages, page_size)
        if kv.values_in_keys:
            row = SharedRow(page_size, kv.value_width)
            return KVPages(keys.numbers, None, *keys[1:], shared=row)
        values = self.packed_values(kv, num_pages, page_size)
        return KVPages(keys.numbers, values.numbers, *keys[1:], *values[1:])


class ScaledOptions(FormatOptions):
    """Codes with scales (KIVI, arXiv 2402.02750): keys have one a channel and group of tokens,
    values one a token and group of channels.

    Attributes:
        bits: of a code.
    """

    bits: ClassVar[int]
    dtype: ClassVar[torch.dtype] = torch.uint8
    has_zero: ClassVar[bool] = True

    key_group: int = Field(32, ge=1, description="tokens of a page that share a scale of keys")
    value_group: int = Field(64, ge=1, description="channels that share a scale of values")

    def check(self, page_size):
        if page_size * self.bits % 8:
            together = 8 // (self.bits & -self.bits)
            raise ValueError(
                f"codec.format {self.name} packs {together} tokens together: page_size "
                f"{page_size} must be a multiple of {together}"
            )

    def wire_values(self, width):
        bits = self.bits if width * self.bits % 8 == 0 else 8
        return WireSide(bits, num_groups(width, self.value_group))

    @property
    def is_packed(self):
        return True, True

    def packed_keys(self, kv, num_pages, page_size):
        groups = num_groups(page_size, self.key_group)
        shape = (kv.num_groups, num_pages, groups, kv.key_width)
        return self._packed(kv, num_pages, page_size, kv.key_width, shape)

    def packed_values(self, kv, num_pages, page_size):
        groups = num_groups(kv.value_width, self.value_group)
        shape = (kv.num_groups, num_pages, page_size, groups)
        return self._packed(kv, num_pages, page_size, kv.value_width, shape)

    def _packed(self, kv, num_pages, page_size, width, scales) -> Packed:
        rows = (kv.num_groups, num_pages, page_size * self.bits // 8, width)
        scale, zero = (
            torch.zeros(scales, dtype=torch.float16, device=kv.device) for _ in range(2)
        )
        numbers = torch.zeros(rows, dtype=self.dtype, device=kv.device)
        return Packed(numbers, scale, zero if self.has_zero else None)


def num_groups(size: int, group: int) -> int:
    """Fewest equal groups of `size` that are no larger than `group`.

    Example:
        48 in groups of at most 32: two groups of 24.
    """
    return next(count for count in range(-(-size // group), size + 1) if size % count == 0)
