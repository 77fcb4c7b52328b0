"""The planner's command line: what it says, refuses and names as a remedy."""

import json
import math

import pytest
import torch.distributed as dist
from published_configs import PUBLISHED

from pikv_megatron.planner.__main__ import main

QWEN3, MIXTRAL = "Qwen3-30B-A3B", "Mixtral-8x7B"


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs the planner on a released model's `config.json`: status, printed, errors."""

    def run(model: str, *options: str) -> tuple[int, str, str]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(PUBLISHED[model][0]))
        status = main(["--model", str(path), *options])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def planned(plan):
    """The same as JSON."""
    return lambda *options: json.loads(plan(*options, "--json")[1])


def test_it_answers_for_any_group_without_starting_one(planned):
    caches = []
    for num_ranks in (1, 2, 8, 128):
        found = planned(QWEN3, "--expert-parallel", str(num_ranks), "--batch", "128")
        assert found["context"] == 40960  # the model's own
        taken = found["bytes_per_rank"]
        assert sum(taken["cache_by_part"].values()) == taken["cache"]
        assert taken["needed"] == taken["weights"] + taken["cache"] + taken["workspace"]
        caches.append(taken["cache"])
    assert caches == sorted(caches, reverse=True) and not dist.is_initialized()


def test_the_largest_group(plan, planned, monkeypatch):
    """512 ranks share the experts of a model that has so many."""
    monkeypatch.setitem(PUBLISHED, "wide", (PUBLISHED[QWEN3][0] | {"num_experts": 512}, 0))
    assert planned("wide", "--expert-parallel", "512", "--batch", "512")["possible"]
    status, _, error = plan("wide", "--expert-parallel", "1024")
    assert status == 2 and "expert_parallel_size 1024 must lie between 1 and 512" in error


def test_the_papers_formula_stands_beside_the_count(planned):
    form = planned(
        QWEN3, "--expert-parallel", "8", "--batch", "4", "--pikv", "h2o", "--context", "32K"
    )["closed_form"]
    pages, size, length = form["num_pages"], form["page_size"], 32768
    token = 48 * 2 * 4 * 128 * 2 * 4 / form["compression"]  # 48 layers, 4 heads, 4 sequences
    assert form["best_page_size"] == pytest.approx(math.sqrt(length / (8 * pages)))
    assert form["total_bytes"] == pytest.approx(token * (length / (8 * size) + pages * size))
    assert form["best_bytes"] == pytest.approx(2 * token * math.sqrt(pages * length / 8))
    at_best = token * (length / (8 * form["best_page_size"]) + pages * form["best_page_size"])
    assert form["best_bytes"] == pytest.approx(at_best)


def test_what_is_impossible_is_refused_with_what_would_do(plan, planned):
    goal = ["--batch", "64", "--context", "32K"]
    status, printed, _ = plan(MIXTRAL, "--expert-parallel", "2", *goal)
    assert status == 1 and "It does not fit: a rank needs" in printed
    found = planned(MIXTRAL, "--expert-parallel", "2", *goal)
    assert not found["possible"] and len(found["remedies"]) == 4
    for remedy in found["remedies"]:
        option, value, *_ = remedy.split()
        options = dict(zip(goal[::2], goal[1::2])) | {"--expert-parallel": "2"} | {option: value}
        assert planned(MIXTRAL, *(x for pair in options.items() for x in pair))["possible"]
    more = "--context", str(found["largest_context"] + 256)
    assert not planned(MIXTRAL, "--expert-parallel", "2", "--batch", "64", *more)["possible"]


def test_a_model_that_is_too_large_for_any_group_says_so(plan):
    status, printed, _ = plan(MIXTRAL, "--memory", "8GB")
    assert status == 1 and "no single change" in printed


def test_sharding_pays_where_one_rank_would_read_alone(planned):
    """One sequence: its home rank would read all of it while the others wait."""
    four = "GLM-4.5-Air", "--expert-parallel", "4"
    alone = planned(*four)
    first = alone["sharding_pays_from"]
    assert 1024 < first < alone["context"]
    assert alone["step_seconds"]["total"] < alone["dense_step_seconds"]
    shorter = planned(*four, "--context", str(first - 128))
    assert shorter["step_seconds"]["total"] >= shorter["dense_step_seconds"]
    assert planned(*four, "--fabric-latency", "1e-3")["sharding_pays_from"] is None


@pytest.mark.parametrize("options, message", [
    (["--expert-parallel", "3"], "expert_parallel_size 3 must divide the model's 128 experts"),
    (["--context", "64K"], "context 65536 exceeds max_sequence_length 40960"),
    (["--context", "many"], "'many' is no number of tokens"),
    (["--memory", "much"], "'much' is no size"),
    (["--pikv", "nothing"], "preset 'nothing' is unknown"),
])
def test_wrong_options_are_named(plan, options, message):
    status, printed, error = plan(QWEN3, *options)
    assert status == 2 and not printed and message in error
