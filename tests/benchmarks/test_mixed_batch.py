"""Batches of sequences of mixed lengths: what is compared is the same work."""

import pytest
import torch
from benchmark_files import parse, write_files
from ranks import run_ranks

from pikv_megatron import process_groups
from pikv_megatron.benchmarks.model.contestants import build_models
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant
from pikv_megatron.benchmarks.model.ragged import RaggedMeasurement, measure_ragged


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("configs"))


def test_a_part_is_a_share_of_a_batch_of_equals():
    measured = RaggedMeasurement((16, 64, 64, 256), 3.0, {16: 1.0, 64: 2.0, 256: 7.0})
    assert measured.parts_ms == 3.0 and measured.mixed_over_parts == 1.0


def test_mixed_batches_hold_the_tokens_that_they_are_said_to(files, one_rank, monkeypatch):
    """A sequence has the same logits in the mixed batch as in the batch of its equals."""
    options, logits = parse(*files, "--lengths", "1", "40", "9", "--steps", "4"), {}
    step = PiKVContestant.step

    def recorded_step(self, tokens):
        found = step(self, tokens)
        logits.setdefault(self.workload.lengths, []).append(found)
        return found

    monkeypatch.setattr(PiKVContestant, "step", recorded_step)
    turns = []
    models = build_models(options, one_rank)
    measure_ragged(options, models, "plain", lambda *turn: turns.append(turn))
    assert turns == [(i + 1, 12) for i in range(12)]  # a turn to warm up and two, of 4 batches
    mixed = torch.stack(logits.pop((1, 40, 9)))
    assert set(logits) == {(1,) * 3, (40,) * 3, (9,) * 3}
    for column, length in enumerate((1, 40, 9)):
        even = torch.stack(logits[(length,) * 3])
        torch.testing.assert_close(mixed[:, column], even[:, column], atol=1e-5, rtol=1e-4)


def mixed_on_ranks(arguments: list[str]) -> float:
    with process_groups(expert_parallel_size=2, timeout_seconds=60) as groups:
        options = parse(*arguments)
        models = build_models(options, groups)
        return measure_ragged(options, models, "plain", lambda *turn: None).mixed_over_parts


def test_mixed_batch_on_two_ranks(files):
    arguments = [*files, "--lengths", "5", "40", "1", "--steps", "2"]
    assert all(ratio > 0 for ratio in run_ranks(mixed_on_ranks, 2, arguments))
