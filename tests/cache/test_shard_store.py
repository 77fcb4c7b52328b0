"""Every token is stored once, read once, and given back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from layer_caches import SCALE, SHAPE

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.owner.owner_reads import OwnerReads
from pikv_megatron.cache.owner.shard_store import ShardStore
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.ops.dense_attention import dense_attention

PLACEMENT = Placement(token_shards=4, expert_shards=1, hash_block=3, num_ranks=2, rank=1)
MAX_PAGES = 400


def new_store(placement, page_size, num_slots=1, has_replicas=False, **fields) -> ShardStore:
    (spec,) = PiKVConfig(page_size=page_size, **fields).resolve([SHAPE])
    return ShardStore(spec, placement, page_size, num_slots, MAX_PAGES, has_replicas)


def insert(store: ShardStore, tokens: TokenBlock) -> None:
    store.insert(tokens, store.admit(tokens))


def count_tokens(store: ShardStore, num_heads: int, visited=None, columns=None) -> torch.Tensor:
    """[num_heads]: equal logits make exp(lse) the number of tokens read."""
    reads = OwnerReads(torch.tensor([0]), MAX_PAGES, (0,), visited, columns)
    state = store.attend(torch.zeros(1, 1, num_heads, 8), reads, [])
    return state.lse.exp()[0, 0]


def block(slot: torch.Tensor, position: torch.Tensor, placement: Placement) -> TokenBlock:
    keys = torch.randn(2, slot.numel(), 8)
    shard = placement.shard(position, None)
    return TokenBlock(keys, keys + 1, slot, shard, position, torch.zeros_like(slot))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_only_this_ranks_tokens_are_stored_each_once(page_size, counts):
    store = new_store(PLACEMENT, page_size, num_slots=2)
    length = 0
    for count in counts:
        position = torch.arange(length, length + count)
        insert(store, block(torch.zeros_like(position), position, PLACEMENT))
        store.check_integrity()
        length += count
    every = torch.arange(length)
    mine = every[PLACEMENT.owner(PLACEMENT.shard(every, None)) == 1]
    assert torch.equal(store.positions(0).sort().values, mine.int())
    assert store.positions(1).numel() == 0


def test_attention_counts_every_stored_token_once():
    store = new_store(PLACEMENT, page_size=4)
    position = torch.arange(50)
    tokens = block(torch.zeros_like(position), position, PLACEMENT)
    insert(store, tokens)
    mine = PLACEMENT.owner(tokens.shard) == 1
    torch.testing.assert_close(count_tokens(store, 4), torch.full((4,), float(mine.sum())))
    query = torch.randn(1, 1, 4, 8)
    state = store.attend(query, OwnerReads(torch.tensor([0]), MAX_PAGES), [])
    dense = dense_attention(query, tokens.keys[:, None, mine], tokens.values[:, None, mine],
                            torch.ones(1, int(mine.sum()), dtype=torch.bool), SCALE)
    torch.testing.assert_close(state.out, dense.out)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 15), st.integers(1, 60))
def test_replicas_count_once_in_whichever_shards_are_visited(replicas, visited, num_tokens):
    """A token counts once if one of its shards is visited, and not at all otherwise."""
    placement = Placement(token_shards=1, expert_shards=4, hash_block=1, num_ranks=1, rank=0)
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:replicas]
                          for _ in range(num_tokens)])
    shard = placement.shard(torch.arange(num_tokens)[:, None], chosen)
    seen = torch.zeros_like(shard)
    for order in range(1, replicas):
        seen[:, order] = seen[:, order - 1] | (1 << shard[:, order - 1])
    slot = torch.zeros_like(shard).masked_fill((seen >> shard) & 1 == 1, -1)
    store = new_store(placement, page_size=3, has_replicas=True)
    keys = torch.randn(2, num_tokens * replicas, 8)
    position = torch.arange(num_tokens)[:, None].expand_as(shard)
    insert(store, TokenBlock(keys, keys, slot.flatten(), shard.flatten(), position.flatten(),
                            seen.flatten()))
    expected = ((visited >> shard) & 1).any(dim=1).sum()
    is_visited = ((visited >> torch.arange(4)) & 1).bool().unsqueeze(0)
    counted = count_tokens(store, 2, visited=is_visited)
    torch.testing.assert_close(counted, torch.full((2,), float(expected)))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_dropped_pages_are_given_back_and_no_longer_read(counts):
    placement = Placement(token_shards=1, expert_shards=1, hash_block=1, num_ranks=1, rank=0)
    store = new_store(
        placement, page_size=4, retention="streaming", budget={"name": "pages", "pages": 2}
    )
    length = 0
    for count in counts:
        position = torch.arange(length, length + count)
        insert(store, block(torch.zeros_like(position), position, placement))
        length += count
        store.keeper.prune(torch.tensor([0]), MAX_PAGES)
        store.check_integrity()
        assert int(store.table.count[0]) == min(2, length // 4)
    kept = torch.arange(max(0, length // 4 - 2) * 4, length)
    assert torch.equal(store.positions(0).sort().values, kept.int())
    torch.testing.assert_close(count_tokens(store, 2), torch.full((2,), float(len(kept))))
    store.release(0)
    store.check_integrity()
    assert store.pool.free.pages().numel() == store.pool.null_page


@pytest.mark.parametrize("is_across, kept", [(False, [2, 3, 6, 7]), (True, [4, 5, 6, 7])])
def test_a_budget_is_spent_in_each_shard_or_across_them(is_across, kept):
    """The first four pages lie in one shard, the others in the other; the newest are worth most."""
    placement = Placement(token_shards=2, expert_shards=1, hash_block=16, num_ranks=1, rank=0)
    budget = {"name": "share", "keep": 0.5, "across_shards": is_across}
    store = new_store(placement, page_size=4, retention="streaming", budget=budget)
    position = torch.arange(32)
    insert(store, block(torch.zeros_like(position), position, placement))
    store.keeper.prune(torch.tensor([0]), MAX_PAGES)
    store.check_integrity()
    pages = torch.unique(store.positions(0) // 4)
    assert pages.tolist() == kept
    assert store.keeper.num_columns(8) >= len(kept)


def test_dropped_places_are_used_again():
    placement = Placement(token_shards=1, expert_shards=1, hash_block=1, num_ranks=1, rank=0)
    store = new_store(
        placement, page_size=2, retention="streaming", budget={"name": "pages", "pages": 3}
    )
    for first in range(0, 200, 4):
        position = torch.arange(first, first + 4)
        insert(store, block(torch.zeros_like(position), position, placement))
        store.keeper.prune(torch.tensor([0]), MAX_PAGES)
    assert store.pool.null_page <= 3 + 2 and int(store.table.count[0]) == 3


def test_chosen_columns_are_what_is_read():
    placement = Placement(token_shards=1, expert_shards=1, hash_block=1, num_ranks=1, rank=0)
    store = new_store(placement, page_size=4)
    position = torch.arange(23)
    tokens = block(torch.zeros_like(position), position, placement)
    insert(store, tokens)
    query = torch.randn(1, 1, 4, 8)
    columns = torch.tensor([[3, -1, 1, -1]])
    state = store.attend(query, OwnerReads(torch.tensor([0]), 10, (0,), columns=columns), [])
    read = torch.tensor([*range(4, 8), *range(12, 16), *range(20, 23)])
    dense = dense_attention(query, tokens.keys[:, None, read], tokens.values[:, None, read],
                            torch.ones(1, len(read), dtype=torch.bool), SCALE)
    torch.testing.assert_close(state.out, dense.out)
