"""The lossless codec."""

from pikv_megatron.compression.base import KVCodec
from pikv_megatron.ops.decode_attention import decode_attention


class NoCodec(KVCodec):
    """Pages are stored as computed."""

    def encode(self, keys, values):
        return keys, values

    def decode(self, keys, values):
        return keys, values

    def attend(self, query, keys, values, page_table, token_mask, softmax_scale):
        return decode_attention(query, keys, values, page_table, token_mask, softmax_scale)
