"""The comparison with kvpress, end to end, on the demo model."""

import json
import subprocess
import sys

import pytest
from test_packaging import ROOT
from tiny_directory import save_tiny_mixtral

from pikv_megatron.benchmarks.kvpress.options import parse_options

PROGRAM, MODEL = ROOT / "launch/compare_kvpress.py", ROOT / "models/demo"


def test_every_contestant_keeps_its_budget(tmp_path):
    pytest.importorskip("kvpress", reason="the extra `kvpress` is not installed")
    output, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    cache = tmp_path / "own.yaml"
    cache.write_text(
        "{page_size: 8, window: 8, shard_after: 0, prefill_chunk_size: 64, codec: {format: int8}}"
    )
    done = subprocess.run(
        [sys.executable, PROGRAM, "--model", MODEL, "--tasks", "recall", "--length", "256",
         "--samples", "1", "--budgets", "0.75", "--policies", "snapkv", "--presses",
         "SnapKV", "KVzip", "StreamingLLM", "--pikv", cache,
         "--output", output, "--picture", picture],
        capture_output=True, text=True, timeout=250,
    )
    assert done.returncode == 0 and "is left out" not in done.stderr, done.stderr
    results = json.loads(output.read_text())["results"]
    first, *others = results
    assert first["name"] == "as computed" and first["held_share"] == 1.0
    names = {result["name"] for result in others}
    presses = {name for name in names if name.startswith("kvpress ")}
    assert presses == {"kvpress SnapKV", "kvpress KVzip", "kvpress StreamingLLM"}
    assert sum(name.startswith("pikv snapkv") for name in names) > 2
    assert "pikv h2o int8" not in names
    own = next(result for result in others if result["name"] == "pikv own")
    assert own["keep"] is None and own["budget"] == pytest.approx(own["held_share"], rel=0.1)
    assert all(0 < result["held_share"] < 0.76 for result in others if result is not own)
    assert all(name in done.stdout for name in names)
    assert all(name in picture.read_text() for name in ("as computed", "kvpress KVzip"))


@pytest.mark.parametrize("arguments, message", [
    (["--tasks", "nothing"], "--tasks nothing is unknown"),
    (["--presses", "nothing"], "--presses nothing: they are SnapKV, "),
    (["--policies", "nothing"], "--policies nothing: they are snapkv, h2o, streaming"),
    (["--budgets", "2"], "--budgets 2.0 must lie between 0 and 1"),
])
def test_wrong_options_are_named(tmp_path, arguments, message):
    save_tiny_mixtral(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_options(["--model", str(tmp_path), *arguments])
