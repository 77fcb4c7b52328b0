"""Sequences come and go in any order, and nothing is lost."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step_plan import StepRow


class Churn(RuleBasedStateMachine):
    """Sequences start, grow, finish and are cancelled in any order; nothing is lost."""

    @initialize(
        page_size=st.integers(1, 5), window=st.integers(0, 6), shards=st.sampled_from([1, 4])
    )
    def start_context(self, page_size, window, shards):
        config = PiKVConfig(page_size=page_size, window=window, token_shards=shards, num_sinks=2,
                            flush_interval=2, sketch="bounding_box")
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
