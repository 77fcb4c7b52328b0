"""launch/benchmark.py on a tiny model: it runs, compares like with like, and refuses the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_ranks

from pikv_megatron import process_groups
from pikv_megatron.benchmarks.decoding import DenseContestant, PiKVContestant
from pikv_megatron.benchmarks.dense_context import grouped_attention, sdpa_attention
from pikv_megatron.benchmarks.measurement import GROUPED, NAMES, PIKV, build_models, measure
from pikv_megatron.benchmarks.options import parse_options
from pikv_megatron.benchmarks.workload import Workload, random_kv

ROOT = Path(__file__).parents[2]
MODEL = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, num_experts=4,
    moe_ffn_hidden_size=32, vocab_size=64, max_sequence_length=512,
)
PIKV_CONFIG = dict(page_size=4, num_sinks=2, window=6, flush_interval=2, token_shards=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """`--model` and `--pikv` with the files that they name, and a context that fits."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (folder / "pikv.yaml").write_text(yaml.safe_dump(PIKV_CONFIG))
    return ["--model", str(folder / "model.yaml"), "--pikv", str(folder / "pikv.yaml"),
            "--contexts", "40"]


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def parse(*arguments: str):
    return parse_options([*arguments], ROOT / "configs")


def run_program(*arguments: str) -> subprocess.CompletedProcess:
    """`python launch/benchmark.py ...`, without the launcher, from a folder without the sources."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["COLUMNS"] = "100"
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/benchmark.py"), *arguments],
        capture_output=True, text=True, timeout=120, env=environment, cwd="/",
    )


def test_table_and_file_are_complete(files, tmp_path):
    output = tmp_path / "results.json"
    run = run_program(
        *files, "--contexts", "9", "70", "--steps", "6", "--batch-size", "2", "--threads", "1",
        "--output", str(output),
    )
    assert run.returncode == 0, run.stderr
    for text in (*NAMES, "9", "70", "PiKV / faster dense", "stock / PiKV"):
        assert text in run.stdout
    report = json.loads(output.read_text())
    assert "launch/benchmark.py --model" in report["command"]
    assert report["machine"]["cpu"] and report["machine"]["threads_per_rank"] == 1
    assert report["machine"]["torch"] == torch.__version__
    assert report["pikv"]["page_size"] == 4 and report["model"]["hidden_size"] == 32
    assert [result["context_len"] for result in report["results"]] == [9, 70]
    for result in report["results"]:
        assert list(result["contestants"]) == list(NAMES)
        for figures in result["contestants"].values():
            assert len(figures["step_ms"]) == 6 and figures["difference"] < 1e-4
            assert figures["mean_ms"] == pytest.approx(sum(figures["step_ms"]) / 6)
            assert 0 < figures["attention_ms"]
        dense = min(result["contestants"][name]["mean_ms"] for name in NAMES[:2])
        ratio = result["contestants"][PIKV]["mean_ms"] / dense
        assert result["pikv_over_faster_dense"]["mean_ms"] == pytest.approx(ratio)
        assert set(result["stock_over_pikv"]) == {"mean_ms", "median_ms"}


def largest_difference(groups, arguments: list[str]) -> float:
    """Between any contestant's logits and the reference's."""
    options, steps = parse(*arguments), []
    models = build_models(options, groups)
    measured = measure(options, models, *options.contexts, lambda: steps.append(1))
    assert len(steps) == options.steps + 2 * options.extra_steps
    return max(measured.differences.values())


def largest_differences_on_ranks(cases: list[list[str]]) -> list[float]:
    with process_groups(expert_parallel_size=2, timeout_seconds=60) as groups:
        return [largest_difference(groups, case) for case in cases]


def test_contestants_agree_on_two_ranks(files):
    """A batch of one leaves the second rank without sequences of its own."""
    cases = [[*files, "--steps", "2", "--batch-size", size] for size in ("1", "3")]
    for differences in run_ranks(largest_differences_on_ranks, 2, cases):
        assert max(differences) < 1e-4


@pytest.mark.parametrize(
    "changes", [dict(expert_shards=4, replicas=2), dict(prefill_chunk_size=7)]
)
def test_contestants_agree_over_other_caches(files, one_rank, tmp_path, changes):
    (tmp_path / "pikv.yaml").write_text(yaml.safe_dump({**PIKV_CONFIG, **changes}))
    arguments = [*files, "--pikv", str(tmp_path / "pikv.yaml"), "--steps", "2"]
    assert largest_difference(one_rank, arguments) < 1e-4


def test_contestants_agree_in_sixteen_bits(files, one_rank):
    largest_difference(one_rank, [*files, "--steps", "6", "--dtype", "bfloat16"])


def test_dense_decoding_is_the_model_without_a_cache(files, one_rank):
    model = build_models(parse(*files), one_rank)[GROUPED]
    tokens = Workload(0, 20, 2, 1, 0, seed=1).tokens(20, MODEL["vocab_size"])
    for attention in (grouped_attention, sdpa_attention):
        workload = Workload(0, 20, 2, 1, 0, seed=1)
        contestant = DenseContestant(model, workload, attention)
        with torch.no_grad():
            contestant.fill(random_kv(model, workload))
            decoded = torch.stack([contestant.step(step) for step in tokens], dim=1)
            plain = model(tokens.t(), torch.arange(20).expand(2, -1), None,
                          runtime_gather_output=True)
        torch.testing.assert_close(decoded, plain, atol=1e-5, rtol=1e-4)


def test_the_processors_clock_is_for_one_rank(monkeypatch):
    assert parse("--clock", "cpu", "--threads", "1").clock == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--clock cpu"):
        parse("--clock", "cpu", "--threads", "1")


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
    with pytest.raises(ValueError, match="no figures: logits of 'PiKV' differ"):
        measure(options, models, *options.contexts, lambda: None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/does/not/exist.yaml"], "--model /does/not/exist.yaml"),
        (["--pikv", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--contexts", "0"], "--contexts"),
        (["--contexts", "many"], "--contexts"),
        (["--contexts", "65536"], "--contexts 65536"),
        (["--batch-size", "0"], "--batch-size"),
        (["--steps", "20"], "--steps 20 must be a multiple of flush_interval 16"),
        (["--steps", "0"], "--steps"),
        (["--dtype", "int4"], "int4"),
        (["--threads", "0"], "--threads"),
        (["--clock", "sun"], "sun"),
        (["--clock", "cpu"], "--clock cpu needs --threads 1"),
        (["--seed", "-1"], "--seed"),
        (["--output", "/does/not/exist/out.json"], "--output /does/not/exist/out.json"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        parse(*arguments)
    assert message in str(error.value)


def test_names_the_file_of_a_broken_model(tmp_path):
    for content in ("- 1", "num_layers: 0", "{"):
        (tmp_path / "model.yaml").write_text(content)
        with pytest.raises(ValueError, match=f"--model {tmp_path}/model.yaml"):
            parse("--model", str(tmp_path / "model.yaml"))


def test_wrong_input_ends_with_one_line_and_code_2(files):
    run = run_program(*files, "--steps", "5")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: --steps 5 must be a multiple")
    assert "Traceback" not in run.stderr


def test_defaults():
    options = parse()
    assert options.contexts == (1024, 8192, 32768) and options.batch_size == 1
    assert options.steps == 64 and options.extra_steps == 16
    assert options.architecture.num_layers == 4 and options.architecture.hidden_size == 512
