"""launch/benchmark.py on a tiny model: what it prints and writes, and how it refuses."""

import json
import subprocess

import pytest
import torch
from benchmark_files import LOSSY, ROOT, write_cache, write_files
from launcher import run_alone

from pikv_megatron.benchmarks.model.measurement import FIGURES
from pikv_megatron.benchmarks.model.options import GROUPED, SDPA, STOCK, TRANSFORMERS


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("configs"))


def run_program(*arguments: str) -> subprocess.CompletedProcess:
    """`python launch/benchmark.py ...`"""
    return run_alone(ROOT / "launch/benchmark.py", *arguments)


@pytest.fixture(scope="module")
def report(files, tmp_path_factory) -> tuple[str, dict]:
    """What the program prints and writes of three caches, two contexts and a mixed batch."""
    folder = tmp_path_factory.mktemp("report")
    caches = [files[3], *(write_cache(folder, name, **LOSSY[name]) for name in LOSSY)]
    run = run_program(
        *files, "--pikv", *caches, "--contexts", "9", "170", "--lengths", "1", "40", "9", "40",
        "--steps", "6", "--batch-size", "2", "--threads", "1", "--output", str(folder / "out.json"),
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((folder / "out.json").read_text())


def test_tables_are_complete(report):
    printed, _ = report
    names = [GROUPED, SDPA, "plain", "boxes", "heavy", STOCK]
    times, held, ratios, mixed = printed.split("tokens ┃")[1:]
    assert "MiB" in held
    for context_len in ("2 x 9", "2 x 170"):
        rows = [line.split("│")[1:3] for line in times.splitlines() if line.startswith("│")]
        found = [name.strip() for length, name in rows if length.strip() == context_len]
        assert found == names
    assert "torch operators" in times
    for text in ("dense", "lossless", "stock"):
        assert text in held.rpartition("how many times as fast")[2] + ratios
    assert mixed.count("1 to 40") == 3


def test_file_is_complete(report):
    _, written = report
    assert "launch/benchmark.py --model" in written["command"]
    assert written["machine"]["cpu"] and written["machine"]["threads_per_rank"] == 1
    assert written["machine"]["torch"] == torch.__version__
    assert written["pikv"]["plain"]["page_size"] == 4 and written["model"]["hidden_size"] == 32
    assert written["pikv"]["heavy"]["retention"]["name"] == "h2o"
    assert [result["context_len"] for result in written["results"]] == [9, 170]
    for result in written["results"]:
        assert list(result["contestants"]) == [GROUPED, SDPA, "plain", "boxes", "heavy", STOCK]
        for name, figures in result["contestants"].items():
            assert len(figures["step_ms"]) == 6 and 0 < figures["attention_ms"]
            assert figures["collective_ms"] == 0  # of one rank
            assert figures["is_lossless"] == (name not in LOSSY)
            assert figures["difference"] < 1e-4 or name in LOSSY
            assert figures["mean_ms"] == pytest.approx(sum(figures["step_ms"]) / 6)
            assert 5 < figures["operator_calls"] < 1000
            assert figures["cache_bytes"] > 2 * result["context_len"] * 128 and not figures["traffic"]


def test_lossy_caches_differ_and_are_reported(report):
    """Behind 170 tokens much is left out."""
    for name in LOSSY:
        assert report[1]["results"][1]["contestants"][name]["difference"] > 1e-3


def test_ratios(report):
    for result in report[1]["results"]:
        contestants = result["contestants"]
        for name in ("plain", *LOSSY):
            own = contestants[name]
            for figure in FIGURES:
                dense = min(contestants[other][figure] for other in (GROUPED, SDPA))
                others = {"faster_dense": dense, "stock": contestants[STOCK][figure]}
                if name in LOSSY:
                    others["lossless"] = contestants["plain"][figure]
                for other, time in others.items():
                    ratio = own[f"{other}_over_this"][figure]
                    assert ratio == pytest.approx(time / own[figure])
        assert "lossless_over_this" not in contestants["plain"]


def test_mixed_batch(report):
    assert list(report[1]["mixed_batch"]) == ["plain", *LOSSY]
    for figures in report[1]["mixed_batch"].values():
        assert figures["lengths"] == [1, 40, 9, 40]
        assert sorted(figures["even_ms"], key=int) == ["1", "9", "40"]
        even = [figures["even_ms"][str(length)] for length in figures["lengths"]]
        assert figures["parts_ms"] == pytest.approx(sum(even) / 4)
        ratio = figures["mixed_ms"] / figures["parts_ms"]
        assert figures["mixed_over_parts"] == pytest.approx(ratio)


def test_wrong_input_ends_with_one_line_and_code_2(files):
    run = run_program(*files, "--steps", "5")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: --steps 5 must be a multiple")
    assert "Traceback" not in run.stderr


def test_transformers_takes_part_and_prompts_are_timed(files, tmp_path):
    """Its logits are those of every other contestant, or nothing would be reported."""
    output = tmp_path / "out.json"
    run = run_program(
        *files, "--transformers", "--contexts", "20", "--prompts", "30", "70", "--steps", "6",
        "--threads", "1", "--output", str(output),
    )
    assert run.returncode == 0, run.stderr
    written = json.loads(output.read_text())
    (result,) = written["results"]
    assert result["contestants"][TRANSFORMERS]["is_lossless"]
    assert written["collective_latency_ms"] is None and written["weights"] == "random"
    assert [set(prompt) for prompt in written["prompts"]] == [{"plain", TRANSFORMERS}] * 2
    for length, by_name in zip((30, 70), written["prompts"]):
        for figures in by_name.values():
            assert figures["prompt_len"] == length and figures["seconds"] > 0
    assert "prompts: the fastest" in run.stdout and run.stdout.count(TRANSFORMERS) >= 4
