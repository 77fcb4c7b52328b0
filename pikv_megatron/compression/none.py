"""The lossless codec."""

import torch

from pikv_megatron.compression.base import KVCodec
from pikv_megatron.ops.decode_attention import decode_attention
from pikv_megatron.ops.seal_page import seal_page
from pikv_megatron.types import KVPages


class NoCodec(KVCodec):
    """Pages are stored as computed."""

    def allocate(self, num_groups, num_pages, page_size, head_dim, dtype, device):
        shape = (num_groups, num_pages, page_size, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVPages(keys, values)

    def seal(self, keys, values, pages, page):
        seal_page(keys, values, pages, page)

    def restore(self, pages, page):
        return pages.keys[:, page], pages.values[:, page]

    def attend(self, query, sealed, plain, softmax_scale):
        return decode_attention(query, [sealed, *plain], softmax_scale)[0]
