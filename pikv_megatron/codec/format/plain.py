"""Numbers as computed."""

from typing import Literal

import torch

from pikv_megatron.codec.format.base import FormatOptions, Packed


class PlainOptions(FormatOptions):
    """Numbers in the type in which they are computed: lossless."""

    name: Literal["plain"] = "plain"

    def packed_keys(self, kv, num_pages, page_size):
        return self._packed(kv, num_pages, page_size, kv.key_width)

    def packed_values(self, kv, num_pages, page_size):
        return self._packed(kv, num_pages, page_size, kv.value_width)

    def _packed(self, kv, num_pages, page_size, width) -> Packed:
        shape = (kv.num_groups, num_pages, page_size, width)
        return Packed(torch.zeros(shape, dtype=kv.dtype, device=kv.device))
