"""Every operation is checked, timed and reported; a wrong one is refused."""

import json

import pytest
import torch

from pikv_megatron.benchmarks.ops import op_cases, op_report, run
from pikv_megatron.benchmarks.ops.random_pages import PAYLOADS
from pikv_megatron.types import AttentionState

TINY = ["--quick", "--tokens", "64", "--page-sizes", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(run, "QUICK_COPY_BYTES", 1 << 16)


def test_every_operation_is_in_table_file_and_plot(tmp_path, capsys):
    files = tmp_path / "results.json", tmp_path / "results.png"
    arguments = [*TINY, "--output", str(files[0]), "--plot", str(files[1])]
    assert run.main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(files[0].read_text())
    assert report["refused"] == {} and report["machine"]["torch"] == torch.__version__
    assert report["command"].startswith("python -m pikv_megatron.benchmarks.ops.run --quick")
    rows = report["results"]
    assert {row["op"] for row in rows} == set(op_cases.CASES)
    for op, count in (("decode_attention", 2), ("seal_page", 1)):
        assert [row["payload"] for row in rows if row["op"] == op] == sorted(
            PAYLOADS * count, key=PAYLOADS.index
        )
    for row in rows:
        assert row["ms"] > 0 and row["copy_share"] > 0 and row["error"] <= 1
        assert row["bytes_per_second"] == pytest.approx(1e3 * row["num_bytes"] / row["ms"])
        has_peers = row["op"] in ("decode_attention", "score_and_attend")
        assert set(row["peer_ms"]) == ({"SDPA", "grouped product"} if has_peers else set())
        assert row["op"] in printed.out
    assert "decode_attention: " in printed.err
    assert files[1].read_bytes()[:4] == b"\x89PNG"


def test_a_broken_operation_is_refused(tmp_path, capsys, monkeypatch):
    def broken(out, lse):
        return AttentionState(out.mean(dim=0), lse.logsumexp(dim=0))

    monkeypatch.setattr(op_cases, "merge_states", broken)
    file = tmp_path / "results.json"
    arguments = [*TINY, "--ops", "merge_states", "project", "--output", str(file)]
    assert run.main(arguments) == 1
    printed = capsys.readouterr()
    assert "refused: merge_states (float32; 8 parts" in printed.err
    assert "merge_states" not in printed.out
    report = json.loads(file.read_text())
    assert {row["op"] for row in report["results"]} == {"project"}
    assert list(report["refused"]) == ["merge_states"]


@pytest.mark.parametrize("op", op_cases.CASES)
def test_no_check_lets_noise_pass(op):
    grid = run.parse_options(TINY).grid
    for case in op_cases.CASES[op](grid):
        result = case.run()
        assert case.error(result) <= 1
        for tensor in tensors_of(result):
            tensor.copy_(1 - tensor.float())
        assert case.error(result) > 1, case.case


def tensors_of(result) -> list[torch.Tensor]:
    """All that a tuple, nested or not, holds."""
    if isinstance(result, torch.Tensor):
        return [] if result.dtype == torch.int64 else [result]
    return [t for part in result or () for t in tensors_of(part)] if result is not None else []


def test_inputs_follow_from_the_seed():
    grids = [run.parse_options([*TINY, "--seed", seed]).grid for seed in ("1", "1", "2")]
    first, again, other = (grid.randn(3, key=1) for grid in grids)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "65"], "--tokens 65: must be a multiple of 8 pages of 8"),
    (["--page-sizes", "6"], "--page-sizes 6: must be a multiple of 8"),
    (["--ops", "softmax"], "--ops"),
    (["--threads", "0"], "--threads"),
    (["--seed", "-1"], "--seed"),
    (["--output", "/no/such/folder/x.json"], "--output"),
    (["--plot", "/no/such/folder/x.png"], "--plot"),
])
def test_bad_options_are_named(arguments, message, capsys):
    assert run.main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([*TINY, "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(op_report, "find_spec", lambda name: None)
    assert run.main([*TINY, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
