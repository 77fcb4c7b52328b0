"""What every codec promises."""

import pytest
import torch

from pikv_megatron.compression.registry import CODECS
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.types import KVPages, PageList

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CODECS)
def test_attention_is_that_over_the_restored_pages_and_the_buffers(name):
    torch.manual_seed(0)
    codec, num_groups, page_size, width = CODECS[name](), 2, 8, 16
    pool = codec.allocate(num_groups, 6, page_size, width, torch.float32, CPU)
    page = torch.tensor([4, 0, 3])
    keys, values = torch.randn(2, num_groups, 3, page_size, width)
    codec.seal(keys, values, pool, page)
    buffers = KVPages(*torch.randn(2, num_groups, 1, page_size, width))
    query = torch.randn(1, 3, 4, width)
    sealed = PageList(pool, torch.tensor([[3, 5, 4]]), torch.tensor([[8, 0, 8]]).int())
    opened = PageList(buffers, torch.tensor([[0]]), torch.tensor([[5]]).int())
    state = codec.attend(query, sealed, [opened], 0.25)

    parts = [codec.restore(pool, torch.tensor([3, 4])), (buffers.keys, buffers.values)]
    dense = [torch.cat([t.flatten(1, 2) for t in kind], dim=1)[:, None] for kind in zip(*parts)]
    mask = torch.arange(3 * page_size)[None] < 2 * page_size + 5
    expected = dense_attention(query, *dense, mask, 0.25)
    torch.testing.assert_close(state.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.lse, expected.lse, atol=1e-5, rtol=1e-4)
