"""Where the attention kernels read and write."""

import mmap

import pytest
import torch
from oracle import relative_rms
from paged_cases import CaseSpec, ListSpec, build

from pikv_megatron.ops.decode_attention import decode_attention as torch_attention
from pikv_megatron.types import KVPages, PageList

GUARD = 256


@pytest.mark.parametrize("payload", ["float32", "float8", "int2", "int3", "int4/int2"])
def test_nothing_is_written_around_the_results(triton_kernel, device, payload, monkeypatch):
    """Every output and workspace lies in the middle of a larger buffer."""
    lists = (ListSpec(payload, 8, 70, 1, 1, True, True, True), ListSpec(payload, 8, 0, 1, 1))
    case = build(CaseSpec(2, 3, 3, 3, 48, 80, torch.bfloat16, lists), device)
    buffers, empty = [], torch.empty

    def guarded_empty(shape, dtype, device):
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), 7.0, dtype=dtype, device=device)
        whole[GUARD : GUARD + size] = torch.nan
        buffers.append(whole)
        return whole[GUARD : GUARD + size].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded_empty)
        attention = triton_kernel("decode_attention")
        (out, _), masses = attention(case.query, case.lists, case.softmax_scale, with_mass=True)
    assert torch.empty is empty and len(buffers) == 6
    for whole in buffers:
        assert (whole[:GUARD] == 7.0).all() and (whole[-GUARD:] == 7.0).all()
        assert not whole.isnan().any(), "something was left unwritten"
    right, _ = torch_attention(case.query, case.lists, case.softmax_scale)
    assert relative_rms(out, right.out) < 1.5e-2
    assert sum(mass.sum(-1) for mass in masses).allclose(right.lse.isfinite().float(), atol=1e-3)


def vast(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, only those that are touched take memory."""
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_numbers = torch.Size(shape).numel()
    memory = mmap.mmap(-1, num_numbers * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.parametrize("version", ["triton", "torch"])
def test_pools_of_more_than_2_31_numbers(triton_kernel, device, version):
    heads, num_pages, page_size, width = 2, 1_100_000, 16, 64
    table = torch.tensor([[num_pages - 1, 3, num_pages - 7]], device=device)
    lens = torch.full((1, 3), page_size, dtype=torch.int32, device=device)
    rng = torch.Generator().manual_seed(0)
    small = [torch.randn(heads, 3, page_size, width, generator=rng).to(device) for _ in range(2)]
    small = [numbers.to(torch.float8_e4m3fn) for numbers in small]
    pools = [vast((heads, num_pages, page_size, width), torch.uint8, device) for _ in range(2)]
    assert pools[0].numel() > 2**31
    for pool, numbers in zip(pools, small):
        pool[:, table[0]] = numbers.view(torch.uint8)
    key_scale = vast((heads, num_pages, 1, width), torch.float16, device)
    value_scale = vast((heads, num_pages, page_size, 1), torch.float16, device)
    for scale in (key_scale, value_scale):
        scale[:, table[0]] = 1.0
    keys, values = (pool.view(torch.float8_e4m3fn) for pool in pools)
    pages = KVPages(keys, values, key_scale, None, value_scale, None)
    query = torch.randn(1, 1, 4, width, generator=rng).to(device)
    attention = triton_kernel("decode_attention") if version == "triton" else torch_attention
    (out, _), _ = attention(query, [PageList(pages, table, lens)], 0.125)
    plain = KVPages(*[numbers.float() for numbers in small])
    columns = torch.arange(3, device=device)[None]
    right, _ = torch_attention(query, [PageList(plain, columns, lens)], 0.125)
    assert relative_rms(out, right.out) < 5e-6
