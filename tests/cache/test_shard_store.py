"""Every token is stored once, read once, and given back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.placement import Placement
from pikv_megatron.cache.shard_store import ShardStore
from pikv_megatron.cache.step_plan import StepRow
from pikv_megatron.cache.tokens import TokenBlock
from pikv_megatron.compression.none import NoCodec
from pikv_megatron.ops.decode_attention import dense_attention

PLACEMENT = Placement(token_shards=4, expert_shards=1, hash_block=3, num_ranks=2, rank=1)


def block(slot: torch.Tensor, position: torch.Tensor, placement: Placement) -> TokenBlock:
    keys = torch.randn(2, slot.numel(), 8)
    shard = placement.shard(position, None)
    return TokenBlock(keys, keys + 1, slot, shard, position, torch.zeros_like(slot))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_only_this_ranks_tokens_are_stored_each_once(page_size, counts):
    store = ShardStore(PLACEMENT, 2, 400 // page_size, page_size, 2, 8, False, NoCodec(),
                       torch.float32, torch.device("cpu"))
    length = 0
    for count in counts:
        position = torch.arange(length, length + count)
        store.insert(block(torch.zeros_like(position), position, PLACEMENT))
        store.check_integrity()
        length += count
    every = torch.arange(length)
    mine = every[PLACEMENT.owner(PLACEMENT.shard(every, None)) == 1]
    assert torch.equal(store.positions(0).sort().values, mine.int())
    assert store.positions(1).numel() == 0


def test_attention_counts_every_stored_token_once():
    store = ShardStore(PLACEMENT, 1, 50, 4, 2, 8, False, NoCodec(), torch.float32, torch.device("cpu"))
    position = torch.arange(50)
    tokens = block(torch.zeros_like(position), position, PLACEMENT)
    store.insert(tokens)
    query = torch.zeros(1, 1, 4, 8)  # equal logits: exp(lse) counts the tokens
    state = store.attend(query, torch.tensor([0]), None, 1.0)
    mine = PLACEMENT.owner(tokens.shard) == 1
    torch.testing.assert_close(state.lse.exp(), torch.full((1, 1, 4), float(mine.sum())))
    query = torch.randn(1, 1, 4, 8)
    state = store.attend(query, torch.tensor([0]), None, 0.3)
    dense = dense_attention(query, tokens.keys[:, None, mine], tokens.values[:, None, mine],
                            torch.ones(1, int(mine.sum()), dtype=torch.bool), 0.3)
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
    store = ShardStore(placement, 1, 200, 3, 2, 8, True, NoCodec(), torch.float32, torch.device("cpu"))
    keys = torch.randn(2, num_tokens * replicas, 8)
    position = torch.arange(num_tokens)[:, None].expand_as(shard)
    store.insert(TokenBlock(keys, keys, slot.flatten(), shard.flatten(), position.flatten(),
                            seen.flatten()))
    state = store.attend(torch.zeros(1, 1, 2, 8), torch.tensor([0]), torch.tensor([visited]), 1.0)
    expected = ((visited >> shard) & 1).any(dim=1).sum()
    torch.testing.assert_close(state.lse.exp(), torch.full((1, 1, 2), float(expected)))


class Churn(RuleBasedStateMachine):
    """Sequences start, grow, finish and are cancelled in any order; nothing is lost."""

    @initialize(page_size=st.integers(1, 5), window=st.integers(0, 6), shards=st.sampled_from([1, 4]))
    def start_context(self, page_size, window, shards):
        config = PiKVConfig(page_size=page_size, window=window, token_shards=shards, num_sinks=2,
                            flush_interval=2)
        self.context = PiKVInferenceContext(4, 200, config)
        self.layer = self.context.layer(1, 2, 8, 1.0, torch.float32, torch.device("cpu"))
        self.live = []

    @precondition(lambda self: len(self.live) < 4)
    @rule()
    def begin(self):
        self.live.append(self.context.start(0))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.sampled_from([1, 1, 1, 2, 9]))
    def grow(self, data, count):
        rows = data.draw(st.lists(st.sampled_from(self.live), min_size=1, unique_by=id))
        rows = [s for s in rows if s.length + count <= 200]
        if not rows:
            return
        self.context.begin_step([[StepRow(s, count) for s in rows]], torch.device("cpu"))
        kv = torch.randn(count, len(rows), 2, 8)
        plan = self.context.plan
        state = self.layer.attend(torch.zeros(count, len(rows), 2, 8), kv, kv, plan)
        assert state.isfinite().all()
        self.layer.settle(plan, None)
        self.context.finish_step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data):
        sequence = data.draw(st.sampled_from(self.live))
        self.live = [s for s in self.live if s is not sequence]
        self.context.release(sequence)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "context"):
            return
        self.context.check_integrity()
        for s in self.live:
            stored = self.layer.store.positions(s.slot).sort().values
            assert torch.equal(stored, torch.arange(2, max(2, s.flushed)).int())


TestChurn = Churn.TestCase
TestChurn.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)


def test_a_full_batch_is_refused():
    context = PiKVInferenceContext(1, 10, PiKVConfig())
    context.start(0)
    with pytest.raises(ValueError, match="max_batch_size 1"):
        context.start(0)


def test_a_sequence_beyond_capacity_is_refused():
    context = PiKVInferenceContext(1, 10, PiKVConfig())
    with pytest.raises(ValueError, match="max_sequence_length 10"):
        context.begin_step([[StepRow(context.start(0), 11)]], torch.device("cpu"))
