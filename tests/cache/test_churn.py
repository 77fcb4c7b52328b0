"""Sequences come and go in any order, and nothing is lost."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layer_caches import HEADS, NUM_GROUPS, WIDTH, new_context

from pikv_megatron import PiKVConfig
from pikv_megatron.cache.step.step_rows import StepRow


class Churn(RuleBasedStateMachine):
    """Sequences start, grow, finish and are cancelled in any order; nothing is lost."""

    @initialize(
        page_size=st.integers(1, 5), window=st.integers(0, 6), shards=st.sampled_from([1, 4]),
        retention=st.sampled_from([
            "all", "h2o", "streaming", {"name": "flexgen", "host": 0.2},
        ]),
        selector=st.sampled_from(["all", "budget", {"name": "mass", "tail": "mean"}]),
        pinned=st.sampled_from([0, 0, 17]),
    )
    def start_context(self, page_size, window, shards, retention, selector, pinned):
        config = PiKVConfig(page_size=page_size, window=window, token_shards=shards, num_sinks=2,
                            flush_interval=2, sketch="bounding_box", retention=retention,
                            selector=selector, pinned=pinned)
        self.context = new_context(config, 4, 200)
        self.layer = self.context.layers[1]
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
        plan = self.context.plan
        kv = torch.randn(plan.num_tokens, NUM_GROUPS, WIDTH)
        state = self.layer.attend(torch.randn(plan.num_tokens, HEADS, WIDTH), kv, kv, plan)
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
        store, directory = self.layer.store, self.layer.directory
        # On one rank a sequence has one row on either side.
        assert torch.equal(store.table.count, directory.table.count)
        for s in self.live:
            stored = store.positions(s.slot).sort().values
            if store.keeper.retention is None:
                assert torch.equal(stored, torch.arange(2, max(2, s.flushed)).int())
            pinned = torch.arange(2, max(2, min(self.context.pikv_config.pinned, s.flushed)))
            assert torch.isin(pinned.int(), stored).all(), "a pinned token was dropped"
            owned, noted = (t.pages_of(s.slot) for t in (store.table, directory.table))
            assert torch.equal(store.pool.shard[owned].long(), directory.shard[noted])
            keys, _ = store.restore(owned, torch.full_like(owned, s.slot))
            assert torch.equal(directory.sketch.low[:, noted], keys.amin(2))


TestChurn = Churn.TestCase
TestChurn.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)


def test_a_full_batch_is_refused():
    context = new_context(PiKVConfig(), 1, 10)
    context.start(0)
    with pytest.raises(ValueError, match="max_batch_size 1"):
        context.start(0)


def test_a_sequence_beyond_capacity_is_refused():
    context = new_context(PiKVConfig(), 1, 10)
    with pytest.raises(ValueError, match="max_sequence_length 10"):
        context.begin_step([[StepRow(context.start(0), 11)]], torch.device("cpu"))


def test_a_sequence_of_nan_leaves_nothing_behind():
    """Slots, buffers and pages are used again: what they held must not reach the next sequence."""
    context = new_context(PiKVConfig(page_size=4, window=3, num_sinks=2, flush_interval=2), 2, 60)
    layer, generator = context.layers[1], torch.Generator().manual_seed(0)

    def run(sequence, other, value: float) -> torch.Tensor:
        for count in (23, 1, 1, 1):
            rows = [StepRow(s, count) for s in (sequence, other)]
            context.begin_step([rows], torch.device("cpu"))
            keys = torch.randn(2 * count, NUM_GROUPS, WIDTH, generator=generator)
            keys[:count] *= value
            out = layer.attend(keys.repeat(1, HEADS // NUM_GROUPS, 1), keys, keys, context.plan)
            layer.settle(context.plan, None)
            context.finish_step()
        return out

    first, second = context.start(0), context.start(0)
    out = run(first, second, torch.nan)
    assert out[:1].isnan().all() and out[1:].isfinite().all()
    context.release(first)
    context.release(second)
    assert run(context.start(0), context.start(0), 1.0).isfinite().all()
