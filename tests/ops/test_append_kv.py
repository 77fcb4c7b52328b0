"""Tokens land where they are told to, and nowhere else."""

import hypothesis.strategies as st
import torch
from guarded_pools import guarded, poisoned
from hypothesis import given, settings

from pikv_megatron.ops.append_kv import append_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def append_cases(draw):
    """Tokens with distinct places, some of them lost."""
    num_groups, num_tokens = draw(st.integers(1, 5)), draw(st.integers(0, 70))
    page_size = draw(st.sampled_from([1, 3, 16, 63]))
    num_pages = max(2, 2 * num_tokens // page_size + 2)
    seed = draw(st.integers(0, 10**6))
    rng = torch.Generator().manual_seed(seed)
    place = torch.randperm((num_pages - 1) * page_size, generator=rng)[:num_tokens]
    page, offset = place // page_size, place % page_size
    page[torch.rand(page.numel(), generator=rng) < 0.3] = -1
    widths = [draw(st.sampled_from([16, 33, 128, 256])) for _ in range(2)]
    dtype, pool_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    tokens = [
        torch.randn(num_groups, page.numel(), w, generator=rng).to(dtype) for w in widths
    ]
    shapes = [(num_groups, num_pages, page_size, w) for w in widths]
    return tokens, shapes, pool_dtype, page, offset


def check(append, case, device="cpu", rtol: float = 0.0) -> None:
    (keys, values), shapes, dtype, page, offset = case
    pools = [guarded(shape, dtype, device) for shape in shapes]
    # Callers have tokens first: heads and tokens are transposed in memory.
    tokens = [poisoned(x.transpose(0, 1).to(device)).transpose(0, 1) for x in (keys, values)]
    page, offset = page.to(device), offset.to(device)
    append(*tokens, pools[0].view, pools[1].view, page, offset)
    for pool, x in zip(pools, tokens):
        pool.assert_rest_untouched(page)
        kept = page >= 0
        written = pool.view[:, page[kept], offset[kept]]
        right = x[:, kept].to(dtype)
        torch.testing.assert_close(written.float(), right.float(), rtol=rtol, atol=0)
        named = pool.view[:, :-1].view(pool.whole.dtype) != pool.whole[0, 0, 0, 0]
        assert int(named.any(-1).sum()) <= x.shape[0] * int(kept.sum())


@settings(deadline=None, max_examples=50)
@given(append_cases())
def test_every_token_lands_in_its_place(case):
    check(append_kv, case)


def test_keys_can_come_alone():
    keys, pool = torch.ones(2, 1, 3), torch.zeros(2, 2, 4, 3)
    append_kv(keys, None, pool, None, torch.tensor([0]), torch.tensor([2]))
    assert pool[:, 0, 2].eq(1).all() and pool.sum() == keys.sum()


def test_heads_keep_their_tokens():
    keys = torch.arange(4.0).view(2, 2, 1)
    pool_keys, pool_values = torch.zeros(2, 2, 2, 2, 1)
    append_kv(keys, -keys, pool_keys, pool_values, torch.tensor([0, 0]), torch.tensor([1, 0]))
    assert pool_keys[:, 0].flatten().tolist() == [1, 0, 3, 2]
    assert pool_values[:, 0].flatten().tolist() == [-1, 0, -3, -2]
