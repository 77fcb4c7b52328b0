"""What travels in fewer bits comes as its page would have it, or nearly as it was."""

import pytest
import torch

from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.codec.registry import CodecOptions, Format
from pikv_megatron.options import members
from pikv_megatron.types import KVShape

KV = KVShape(2, 48, 32, torch.float32, torch.device("cpu"))
S = 16


def journey(codec: CodecOptions, keys: torch.Tensor, values: torch.Tensor):
    """The block that comes, and the bytes of a row."""
    number = torch.arange(keys.shape[1])
    sizes = []

    def send(rows):
        sizes.append(rows.shape[1])
        return rows[1:]  # another rank has other rows

    block = TokenBlock(keys, values, number, number % 2, number + 5, number * 0)
    return block.sent(codec.wire(KV), send), sizes[0]


@pytest.mark.parametrize("packing", members(Format))
def test_values_come_as_their_page_will_store_them_and_keys_lose_little(packing):
    codec = CodecOptions(format=packing)
    keys, values = torch.randn(2, S + 1, 48), torch.randn(2, S + 1, 32)
    keys[..., 3] *= 50.0
    came, row_bytes = journey(codec, keys, values)
    assert torch.equal(came.position, torch.arange(1, S + 1) + 5)
    assert row_bytes == 32 + codec.wire(KV).token_bytes(KV)
    if packing == "plain":
        assert torch.equal(came.keys, keys[:, 1:]) and torch.equal(came.values, values[:, 1:])
        return
    assert row_bytes < 32 + KV.token_bytes / 3
    spread = keys[:, 1:].amax(2) - keys[:, 1:].amin(2)
    assert ((came.keys - keys[:, 1:]).abs().amax(2) <= spread * 0.51 / 255 + 1e-4).all()
    if packing == "float8":
        return
    stored = []
    for x in (values[:, 1:], came.values):
        built = codec.build(KV, S, 1)
        pool, page = built.allocate(2), torch.tensor([0])
        built.seal(keys[:, None, 1:], x[:, None], pool, page, page)
        stored.append(built.restore(pool, page, page)[1])
    torch.testing.assert_close(*stored, atol=5e-3, rtol=5e-3)


def test_values_that_are_turned_first_travel_in_eight_bits():
    wire = CodecOptions(format="int2", rotation="hadamard").wire(KV)
    assert wire.values.bits == 8
    assert CodecOptions(format={"keys": "plain", "values": "int2"}).wire(KV).keys is None


def test_odd_widths_travel_in_whole_bytes():
    wire = CodecOptions(format="int3").wire(KV._replace(value_width=33))
    assert wire.values.bits == 8 and wire.keys.bits == 8


def test_one_row_of_latent_attention():
    kv = KVShape(1, 40, 24, torch.bfloat16, torch.device("cpu"), values_in_keys=True)
    wire = CodecOptions(format="int4").wire(kv)
    rows = torch.randn(1, 6, 40).bfloat16()
    number = torch.arange(6)
    block = TokenBlock(rows, None, number, number, number, number, score=number.float())
    came = block.sent(wire, lambda x: x)
    assert came.values is None and came.keys.dtype == torch.bfloat16
    assert (came.keys - rows).abs().max() < 0.03 and torch.equal(came.score, block.score)
    assert wire.token_bytes(kv) == 40 + 4
