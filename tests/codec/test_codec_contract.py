"""What every codec promises: transforms and formats in every combination."""

from itertools import product

import pytest
import torch

from pikv_megatron.codec.registry import CodecOptions, Format, Transform
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.options import members
from pikv_megatron.types import KVPages, KVShape, PageList

NG, HN = 2, 16
KV = KVShape(NG, HN, HN, torch.float32, torch.device("cpu"))
# Pooled pages of 16 tokens hold 8, and numbers of 3 bits are packed by 8.
S = 16
CODECS = list(product(members(Transform), members(Format)))
KEYS, VALUES = torch.randn(2, NG, 3, S, HN, generator=torch.Generator().manual_seed(0))
PAGE, SLOTS = torch.tensor([4, 0, 3]), torch.tensor([1, 1, 1])


def sealed_pool(transform: str, packing: str, rotation: str = "none", **fields):
    options = CodecOptions(
        transform={"name": transform, **fields}, rotation=rotation, format=packing
    )
    codec = options.build(KV, S, 2)
    if codec.learns:
        codec.fit(1, KEYS.flatten(1, 2), VALUES.flatten(1, 2))
    pool = codec.allocate(6)
    codec.seal(KEYS, VALUES, pool, PAGE, SLOTS)
    return codec, pool


@pytest.mark.parametrize("transform, packing", CODECS)
@pytest.mark.parametrize("rotation, with_buffers", [("none", True), ("hadamard", False)])
def test_attention_is_that_over_the_restored_pages_and_the_buffers(
    transform, packing, rotation, with_buffers
):
    codec, pool = sealed_pool(transform, packing, rotation)
    buffers = KVPages(*torch.randn(2, NG, 1, S, HN))
    query = torch.randn(1, 3, 4, HN)
    sealed = PageList(pool, torch.tensor([[3, 5, 4]]), torch.tensor([[S, 0, S]]).int())
    opened = PageList(buffers, torch.tensor([[0]]), torch.tensor([[5]]).int())
    plain = [opened] if with_buffers else []
    slots = torch.tensor([1])
    state, (mass, *_) = codec.attend(query, [sealed], plain, 0.25, slots, with_mass=True)

    parts = [codec.restore(pool, torch.tensor([3, 4]), SLOTS[:2]), (buffers.keys, buffers.values)]
    dense = [torch.cat([t.flatten(1, 2) for t in kind], dim=1)[:, None] for kind in zip(*parts)]
    mask = torch.arange(3 * S)[None] < 2 * S + 5 * with_buffers
    expected = dense_attention(query, *dense, mask, 0.25)
    torch.testing.assert_close(state.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.lse, expected.lse, atol=1e-5, rtol=1e-4)
    keys = dense[0].repeat_interleave(2, dim=0)[:, 0, : mask.sum()]
    logits = torch.einsum("qhw,htw->qht", query[0], keys) * 0.25
    weights = logits.softmax(2)
    by_page = codec.page_logits(query[:, 0], [sealed], 0.25, torch.tensor([1]))
    for column, first in ((0, 0), (2, S)):
        share = weights[:, :, first : first + S].sum(2)
        torch.testing.assert_close(mass[0, :, :, column], share, atol=1e-5, rtol=1e-4)
        own = logits[0, :, first : first + S].logsumexp(1)
        torch.testing.assert_close(by_page[0, :, column], own, atol=1e-4, rtol=1e-4)
    assert not mass[..., 1].any() and (by_page[..., 1] == -torch.inf).all()


@pytest.mark.parametrize("transform", [name for name in members(Transform) if name != "mixed"])
@pytest.mark.parametrize("packing", ["plain", "int4"])
def test_rows_that_hold_their_values_are_stored_once(transform, packing):
    width = HN - 5
    kv = KVShape(1, HN, width, torch.float32, torch.device("cpu"), values_in_keys=True)
    codec = CodecOptions(transform=transform, format=packing).build(kv, S, 2)
    rows = KEYS[:1]
    if codec.learns:
        codec.fit(1, rows.flatten(1, 2), rows[..., :width].flatten(1, 2))
    pool = codec.allocate(6)
    codec.seal(rows, rows[..., :width], pool, PAGE, SLOTS)
    assert pool.values is None and pool.value_scale is None
    query = torch.randn(1, 3, 4, HN)
    sealed = PageList(pool, torch.tensor([[3, 4]]), torch.tensor([[S, S]]).int())
    opened = PageList(
        KVPages.plain(torch.randn(1, 1, S, HN), None, width), torch.tensor([[0]]),
        torch.tensor([[5]]).int(),
    )
    state, _ = codec.attend(query, [sealed], [opened], 0.25, torch.tensor([1]))
    keys, values = codec.restore(pool, torch.tensor([3, 4]), SLOTS[:2])
    keys = torch.cat([keys.flatten(1, 2), opened.pages.keys[:, 0]], dim=1)[:, None]
    values = torch.cat([values.flatten(1, 2), opened.pages.keys[:, 0, :, :width]], dim=1)[:, None]
    expected = dense_attention(query, keys, values, torch.arange(3 * S)[None] < 2 * S + 5, 0.25)
    torch.testing.assert_close(state.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.lse, expected.lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields, named", [
    ({"transform": "mixed"}, "codec.transform 'mixed'"),
    ({"format": {"keys": "int8", "values": "int4"}}, "codec.format 'mixed'"),
    ({"rotation": "hadamard"}, "codec.rotation 'hadamard'"),
    ({"transform": {"name": "svd", "value_rank": 4}}, "codec.transform.value_rank 4"),
])
def test_what_treats_keys_and_values_apart_is_refused_for_latent_rows(fields, named):
    kv = KVShape(1, HN, HN - 5, torch.float32, torch.device("cpu"), values_in_keys=True)
    with pytest.raises(ValueError, match=named):
        CodecOptions(**fields).build(kv, S, 1)


@pytest.mark.parametrize("transform, packing", CODECS)
def test_a_page_that_is_not_read_leaves_no_trace(transform, packing):
    codec, pool = sealed_pool(transform, packing)
    nothing = PageList(pool, torch.tensor([[5]]), torch.tensor([[0]]).int())
    query = torch.randn(1, 1, 4, HN)
    state, _ = codec.attend(query, [nothing], [], 0.25, torch.tensor([1]))
    assert (state.lse == -torch.inf).all() and not state.out.any()


@pytest.mark.parametrize("packing, keys, values", [
    ("plain", 0.0, 0.0), ("float8", 0.2, 0.2), ("int8", 0.02, 0.02), ("int4", 0.3, 0.3),
    ("int3", 0.5, 0.5), ("int2", 1.0, 1.0), ({"keys": "int8", "values": "int3"}, 0.02, 0.5),
    ({"keys": "int4", "values": "plain"}, 0.3, 0.0),
])
def test_formats_restore_numbers_to_half_a_step(packing, keys, values):
    codec, pool = sealed_pool("identity", packing)
    restored = codec.restore(pool, PAGE, SLOTS)
    for part, whole, tolerance in zip(restored, (KEYS, VALUES), (keys, values)):
        assert tolerance / 4 <= (part - whole).abs().max() <= tolerance


def bytes_of(codec, num_pages: int) -> int:
    """Of pages and of all that is kept besides."""
    tensors = [t for t in codec.allocate(num_pages) if t is not None]
    return sum(t.nbytes for t in [*tensors, *codec.tensors()])


@pytest.mark.parametrize("fields, factor", [
    ({"format": "float8"}, 1.8), ({"format": "int8"}, 1.8), ({"format": "int4"}, 3.2),
    ({"format": "int3"}, 4.0), ({"format": "int2"}, 5.3), ({"format": "mixed"}, 4.0),
    ({"transform": "svd"}, 1.9), ({"transform": "svd", "format": "int4"}, 5.5),
])
def test_saved_bytes_are_saved(fields, factor):
    """One sequence of 8,192 tokens, whose bases are counted, too."""
    kv = KVShape(8, 128, 128, torch.bfloat16, torch.device("cpu"))
    plain, packed = (CodecOptions(**f).build(kv, 64, 1) for f in ({}, fields))
    assert bytes_of(plain, 128) >= factor * bytes_of(packed, 128)


@pytest.mark.parametrize("fields, page_size, named", [
    ({"transform": {"name": "svd", "rank": 17}}, 8, "codec.transform.rank 17"),
    ({"transform": {"name": "svd", "value_rank": 17}}, 8, "codec.transform.value_rank 17"),
    ({"transform": {"name": "svd", "rank": 5}, "rotation": "hadamard"}, 8, "5 is odd"),
    ({"transform": {"name": "pyramidkv", "level": 2}}, 6, "page_size 6 must be a multiple of 4"),
    ({"transform": "pyramidkv", "format": "int3"}, 8, "page_size 4 must be a multiple of 8"),
    ({"format": "int4"}, 7, "page_size 7 must be a multiple of 2"),
    ({"format": "int3"}, 12, "page_size 12 must be a multiple of 8"),
    ({"format": {"keys": "int8", "values": "int2"}}, 6, "page_size 6 must be a multiple of 4"),
])
def test_what_does_not_fit_is_refused(fields, page_size, named):
    with pytest.raises(ValueError, match=named):
        CodecOptions(**fields).build(KV, page_size, 1)
