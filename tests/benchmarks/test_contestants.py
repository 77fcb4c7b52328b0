"""The contestants of the model benchmark: they compare like with like, or are refused."""

import pytest
import torch
from benchmark_files import LOSSY, MODEL, parse, write_cache, write_files
from ranks import run_ranks

from pikv_megatron import process_groups
from pikv_megatron.benchmarks.model.contestants import build_models
from pikv_megatron.benchmarks.model.decoding import DenseContestant
from pikv_megatron.benchmarks.model.dense_context import grouped_attention, sdpa_attention
from pikv_megatron.benchmarks.model.measurement import Measurement, Timing, measure
from pikv_megatron.benchmarks.model.operator_calls import OperatorCounter
from pikv_megatron.benchmarks.model.options import GROUPED, SDPA
from pikv_megatron.benchmarks.model.pikv_decoding import PiKVContestant, is_lossless
from pikv_megatron.benchmarks.model.workload import Workload, random_kv
from pikv_megatron.config import PiKVConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("configs"))


def measured(groups, arguments: list[str]) -> Measurement:
    options, steps = parse(*arguments), []
    models = build_models(options, groups)
    shape = *options.contexts, *options.batch_sizes
    found = measure(options, models, *shape, lambda: steps.append(1))
    assert len(steps) == options.num_steps
    return found


def largest_difference(groups, arguments: list[str]) -> float:
    """Between any contestant's logits and the reference's."""
    return max(timing.difference for timing in measured(groups, arguments).timings.values())


def measured_on_ranks(cases: list[list[str]]) -> list[dict[str, Timing]]:
    with process_groups(expert_parallel_size=2, timeout_seconds=60) as groups:
        return [measured(groups, case).timings for case in cases]


def test_contestants_agree_on_two_ranks(files):
    """A batch of one leaves the second rank without sequences of its own. What the first one sends
    is what is planned."""
    cases = [[*files, "--steps", "2", "--batch-size", size] for size in ("1", "3")]
    for rank, found in enumerate(run_ranks(measured_on_ranks, 2, cases)):
        for timings in found:
            assert max(timing.difference for timing in timings.values()) < 1e-4
            assert not timings[GROUPED].traffic
            assert min(timing.collective_ms for timing in timings.values()) > 0
            assert rank or timings["plain"].traffic.measured == timings["plain"].traffic.planned > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(expert_shards=4, replicas=2),
        dict(prefill_chunk_size=3),  # the last chunk has one token
        dict(sketch="bounding_box", selector=dict(name="budget", share=1.0)),  # all pages
    ],
)
def test_contestants_agree_over_other_caches(files, one_rank, tmp_path, changes):
    other = write_cache(tmp_path, "other", **changes)
    arguments = [*files, "--pikv", files[3], other, "--steps", "2", "--batch-size", "2"]
    assert largest_difference(one_rank, arguments) < 1e-4


def test_contestants_agree_in_sixteen_bits(files, one_rank):
    largest_difference(one_rank, [*files, "--steps", "6", "--dtype", "bfloat16"])


def test_dense_decoding_is_the_model_without_a_cache(files, one_rank):
    model = build_models(parse(*files), one_rank)[GROUPED]
    tokens = Workload((0, 0), 20, 1, 0, seed=1).tokens(20, MODEL["vocab_size"])
    for attention in (grouped_attention, sdpa_attention):
        workload = Workload((0, 0), 20, 1, 0, seed=1)
        contestant = DenseContestant(model, workload, attention)
        with torch.no_grad():
            contestant.fill(random_kv(model, workload))
            decoded = torch.stack([contestant.step(step) for step in tokens], dim=1)
            plain = model(tokens.t(), torch.arange(20).expand(2, -1), None,
                          runtime_gather_output=True)
        torch.testing.assert_close(decoded, plain, atol=1e-5, rtol=1e-4)


def test_refuses_figures_of_caches_that_differ(files, one_rank, monkeypatch):
    """One value of one cached token is enough."""
    options = parse(*files, "--steps", "2")
    models = build_models(options, one_rank)
    fill = PiKVContestant.fill

    def fill_wrongly(self, layers):
        values = layers[0].values.clone()
        values[5, 0, 0, 0] += 100.0
        fill(self, [layers[0]._replace(values=values), *layers[1:]])

    monkeypatch.setattr(PiKVContestant, "fill", fill_wrongly)
    with pytest.raises(ValueError, match="no figures: logits of 'plain' differ"):
        measure(options, models, *options.contexts, *options.batch_sizes, lambda: None)


def test_refuses_lossy_logits_that_are_not_numbers(files, one_rank, tmp_path, monkeypatch):
    options = parse(*files, "--pikv", write_cache(tmp_path, "boxes", **LOSSY["boxes"]))
    models = build_models(options, one_rank)
    step = PiKVContestant.step
    monkeypatch.setattr(PiKVContestant, "step", lambda *args: step(*args) * float("nan"))
    with pytest.raises(ValueError, match="no figures: logits of 'boxes' differ"):
        measure(options, models, *options.contexts, *options.batch_sizes, lambda: None)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(), True),
        (dict(page_size=16, sketch="mean_key", replicas=2, expert_shards=2), True),
        (dict(selector=dict(name="all", tail="none"), codec=dict(format="plain")), True),
        (dict(router="top_k"), False),
        (LOSSY["boxes"], False),
        (LOSSY["heavy"], False),
        (dict(codec=dict(format="int8")), False),
        (dict(codec=dict(transform="svd")), False),
    ],
)
def test_tells_lossless_caches(changes, expected):
    assert is_lossless(PiKVConfig(**changes).resolved()) == expected


def test_a_cache_is_lossy_if_one_layer_is(files, one_rank, tmp_path):
    found = {}
    for name, match in (("second", "1"), ("first", "0")):
        cache = write_cache(tmp_path, name, layers=[dict(match=match, **LOSSY["heavy"])])
        found[name] = measured(one_rank, [*files, "--pikv", cache, "--steps", "2"]).timings[name]
    assert not any(timing.is_lossless for timing in found.values())


def test_counts_operators_while_it_is_told_to():
    counter, numbers = OperatorCounter(), torch.ones(2, 3)
    with counter:
        numbers.sin()
        counter.start()
        torch.mm(numbers, numbers.t()).add_(1)  # a product, a view, a sum
        counter.stop()
        numbers.cos()
    assert counter.num_calls == 3


def test_counts_attention_alone(files, one_rank):
    """More tokens call more experts, and dense attention as often as before."""
    calls = [
        measured(one_rank, [*files, "--batch-size", size, "--steps", "2"]).timings
        for size in ("1", "3")
    ]
    for name in (GROUPED, SDPA):
        assert calls[0][name].operator_calls == calls[1][name].operator_calls
