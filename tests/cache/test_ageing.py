"""Older pages become one, two by two, and stand for as many tokens; or they take fewer bits."""

import hypothesis.strategies as st
import torch
from hypothesis import example, given, settings
from layer_caches import SCALE
from test_shard_store import MAX_PAGES, PLACEMENT, block, count_tokens, insert, new_store

from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.placement import Placement
from pikv_megatron.ops.dense_attention import dense_attention

SLOTS = torch.tensor([0, 1])
PAGE_SIZE = 8
# Masses are counted, and no page is over the budget.
COUNTING = {"retention": "h2o", "budget": {"name": "share", "keep": 1.0}}


@settings(deadline=None, max_examples=40)
@example(page_size=2, level=0, young=3, levels=3, counts=[6, 60, 60, 60], retention=COUNTING)
@given(
    page_size=st.sampled_from([2, 4, 6]), level=st.integers(0, 1), young=st.integers(1, 3),
    levels=st.integers(1, 3), counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    retention=st.sampled_from([{}, COUNTING]),
)
def test_every_token_counts_once_and_means_stay(
    page_size, level, young, levels, counts, retention
):
    """Without a query, attention is the mean of all values: pooling does not change it."""
    transform = {"name": "pyramidkv", "level": level, "young": young, "levels": levels}
    store = new_store(
        PLACEMENT, page_size, num_slots=2, codec={"transform": transform}, **retention
    )
    values, first = [], 0
    store.keeper.age(SLOTS, 0)  # the first chunk of a prompt may fill no page
    for count in counts:
        position = torch.arange(first, first + count)
        tokens = block(torch.zeros_like(position), position, PLACEMENT)
        insert(store, tokens)
        values.append(tokens.values[:, PLACEMENT.owner(tokens.shard) == PLACEMENT.rank])
        for drop in store.keeper.age(SLOTS, MAX_PAGES):
            assert drop.shape == (2, MAX_PAGES) and not drop[1].any()
        store.check_integrity()
        first += count
    whole = torch.cat(values, dim=1)
    if not whole.shape[1]:
        return
    counted = count_tokens(store, 4)
    torch.testing.assert_close(counted, torch.full((4,), float(whole.shape[1])), rtol=1e-4, atol=0)
    reads = OwnerReads(torch.tensor([0]), MAX_PAGES, (0,))
    out = store.attend(torch.zeros(1, 1, 4, 8), reads, []).out[0, 0]
    mean = whole.mean(1).repeat_interleave(2, dim=0)
    torch.testing.assert_close(out, mean, rtol=1e-3, atol=1e-3)
    sealed, kept = int(store.ledger.num_pages[0]), int(store.table.count[0])
    assert kept <= store._codec.ageing.most(sealed, store._shards) <= sealed


def test_the_oldest_are_pooled_first_and_level_by_level():
    """Nine pages, one young one of each level: (0 1 2 3) (4 5) (6 7) 8."""
    placement = Placement(token_shards=1, expert_shards=1, hash_block=3, num_ranks=1, rank=0)
    transform = {"name": "pyramidkv", "level": 0, "young": 1, "levels": 3}
    store = new_store(placement, 2, codec={"transform": transform})
    position = torch.arange(18)
    insert(store, block(torch.zeros_like(position), position, placement))
    store.keeper.age(torch.tensor([0]), MAX_PAGES)
    pages = store.table.pages_of(0)
    stood_for = store.pool.kv.log_multiplicity[pages].exp().round().int().tolist()
    assert stood_for == [4, 2, 2, 1]
    newest = store.pool.position[pages, -1].tolist()
    assert newest == sorted(newest) and newest[-1] == 17
    store.release(0)
    store.check_integrity()
    assert not store.table.count.any()


@settings(deadline=None, max_examples=40)
@given(
    young=st.integers(1, 3), level=st.integers(0, 1),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    retention=st.sampled_from([{}, COUNTING, {"retention": "streaming"}]),
)
def test_pages_that_grow_old_are_stored_in_fewer_bits_and_read_as_such(
    young, level, counts, retention
):
    """Of every shard the newest pages are new ones, and attention is that over what is stored."""
    codec = {
        "transform": {"name": "pyramidkv", "level": level},
        "format": {"name": "aged", "young": young, "new": "plain", "old": "int2"},
    }
    store = new_store(PLACEMENT, PAGE_SIZE, num_slots=2, codec=codec, **retention)
    first = 0
    for count in counts:
        position = torch.arange(first, first + count)
        insert(store, block(torch.zeros_like(position), position, PLACEMENT))
        if store.keeper.retention is not None:
            store.keeper.prune(SLOTS, MAX_PAGES)
        store.keeper.grow_old(SLOTS, MAX_PAGES)
        store.check_integrity()
        first += count
        pages = store.table.pages_of(0)
        shards, newest = store.pool.shard[pages], store.pool.position[pages, -1]
        is_old = store.pool.place[pages] < 0
        for shard in shards.unique():
            of_shard = shards == shard
            order = newest[of_shard].argsort(descending=True)
            assert torch.equal(is_old[of_shard][order], torch.arange(len(order)) >= young)
    if not len(pages):
        return
    keys, values = store.restore(pages, torch.zeros_like(pages))
    tokens, lens = (x.flatten(1, 2) for x in (keys, values)), store.buffers.lens(torch.arange(2))
    opened = [
        torch.cat([store.buffers.tensors[name][:, group, :length] for group, length in
                   enumerate(lens.tolist())], dim=1) for name in ("keys", "values")
    ]
    keys, values = (torch.cat(pair, dim=1)[:, None] for pair in zip(tokens, opened))
    query = torch.randn(1, 1, 4, 8)
    everything = torch.ones(1, keys.shape[2], dtype=torch.bool)
    expected = dense_attention(query, keys, values, everything, SCALE)
    reads = OwnerReads(torch.tensor([0]), MAX_PAGES, (0,))
    state = store.attend(query, reads, [])
    torch.testing.assert_close(state.out, expected.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.lse, expected.lse, rtol=1e-4, atol=1e-4)
    store.release(0)
    store.check_integrity()
    store.compact()
    assert store.pool.sizes == (0, 0, 0)


def test_places_are_used_again_and_numbers_stay():
    """Two pages of a shard stay new; what is packed anew leaves its place to the next ones."""
    placement = Placement(token_shards=1, expert_shards=1, hash_block=8, num_ranks=1, rank=0)
    codec = {"format": {"name": "aged", "young": 2, "new": "plain", "old": "int4"}}
    store = new_store(placement, PAGE_SIZE, codec=codec)
    for number in range(6):
        position = torch.arange(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)
        insert(store, block(torch.zeros_like(position), position, placement))
        store.keeper.grow_old(torch.tensor([0]), MAX_PAGES)
    assert store.table.pages_of(0).tolist() == [0, 1, 2, 3, 4, 5]
    assert store.pool.sizes == (6, 3, 4)
    store.compact()
    assert store.pool.sizes == (6, 2, 4)
    store.check_integrity()
    plain = new_store(placement, PAGE_SIZE)
    plain.reserve(6)
    packed = [sum(t.nbytes for t in each.pool.payload()) for each in (store, plain)]
    assert packed[0] < packed[1]
