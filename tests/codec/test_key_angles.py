"""Keys that are stored before RoPE are read behind it."""

import pytest
import torch
from layer_caches import SCALE, SHAPE

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.ops.turn_keys import angle_table, turn_keys

FREQUENCIES = torch.tensor([1.0, 0.3, 0.02])  # the last two of eight channels do not turn
LENGTH, PAGE_SIZE = 200, 8


def filled_store(codec: dict) -> tuple[ShardStore, TokenBlock]:
    """Keys that are much alike before RoPE."""
    (spec,) = PiKVConfig(page_size=PAGE_SIZE, codec=codec).resolve([SHAPE])
    placement = Placement(
        token_shards=1, expert_shards=1, hash_block=PAGE_SIZE, num_ranks=1, rank=0
    )
    store = ShardStore(spec, placement, PAGE_SIZE, 1, 100, False, LENGTH)
    if store.angles is not None:
        store.angles.learn(FREQUENCIES)
    rng = torch.Generator().manual_seed(0)
    position = torch.arange(LENGTH)
    mean = torch.randn(2, 1, 8, generator=rng) * 5
    keys = torch.randn(2, LENGTH, 8, generator=rng) + mean
    keys = turn_keys(keys, position, angle_table(FREQUENCIES, LENGTH))
    zero = torch.zeros_like(position)
    block = TokenBlock(keys, keys + 1, zero, zero, position, zero)
    for part in (slice(0, 90), slice(90, LENGTH)):
        tokens = TokenBlock(keys[:, part], keys[:, part] + 1, *(x[part] for x in block[2:6]))
        store.insert(tokens, store.admit(tokens))
        store.keeper.grow_old(torch.tensor([0]), 100)
    return store, block


def error_of(store: ShardStore, block: TokenBlock) -> float:
    pages = store.table.pages_of(0)
    keys, _ = store.restore(pages, torch.zeros_like(pages))
    exact = block.keys[:, store.pool.position[pages].flatten().long()]
    return float((keys.flatten(1, 2) - exact).norm() / exact.norm())


def test_alike_keys_lose_less_before_rope():
    after, before = (
        error_of(*filled_store({"format": "int4", "keys": keys}))
        for keys in ("after_rope", "before_rope")
    )
    assert 0 < before < 0.6 * after
    assert error_of(*filled_store({"keys": "before_rope"})) < 1e-6


@pytest.mark.parametrize("fields", [
    {"format": "int4"}, {"format": "aged"},
    {"format": "int8", "transform": {"keys": "identity", "values": {"name": "svd", "rank": 3}}},
])
@pytest.mark.parametrize("count", [1, 80])
def test_attention_turns_what_it_reads(fields, count):
    """By the decode kernel, and as a prompt's piece."""
    store, block = filled_store({**fields, "keys": "before_rope"})
    pages = store.table.pages_of(0)
    keys, values = (
        x.flatten(1, 2) for x in store.restore(pages, torch.zeros_like(pages))
    )
    query = torch.randn(1, count, 4, 8)
    everything = torch.ones(1, keys.shape[1], dtype=torch.bool)
    expected = dense_attention(query, keys[:, None], values[:, None], everything, SCALE)
    state = store.attend(query, OwnerReads(torch.tensor([0]), 100, (0,)), [])
    torch.testing.assert_close(state.out, expected.out, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(state.lse, expected.lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields, part", [
    ({"transform": "svd"}, "codec.transform svd"), ({"rotation": "hadamard"}, "hadamard"),
])
def test_what_stores_other_channels_is_refused(fields, part):
    with pytest.raises(ValueError, match=f"before_rope.*{part}"):
        PiKVConfig(codec={"keys": "before_rope", **fields}).resolve([SHAPE])


def test_latent_rows_are_refused():
    kv = SHAPE.kv._replace(num_groups=1, value_width=4, values_in_keys=True)
    with pytest.raises(ValueError, match="latent attention"):
        PiKVConfig(codec={"keys": "before_rope"}).resolve([SHAPE._replace(kv=kv)])
