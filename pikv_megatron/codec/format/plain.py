"""Numbers as computed."""

from typing import Literal

import torch

from pikv_megatron.codec.format.base import FormatOptions
from pikv_megatron.types import KVPages


class PlainOptions(FormatOptions):
    """Numbers in the type in which they are computed: lossless."""

    name: Literal["plain"] = "plain"

    def allocate(self, kv, num_pages, page_size):
        shapes = [(kv.num_groups, num_pages, page_size, w) for w in (kv.key_width, kv.value_width)]
        return KVPages(*(torch.zeros(s, dtype=kv.dtype, device=kv.device) for s in shapes))
