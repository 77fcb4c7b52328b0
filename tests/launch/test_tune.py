"""launch/tune.py says what each cache costs in each layer, and chooses within a budget."""

import re
from pathlib import Path

import pytest
import yaml
from launcher import run_alone
from tiny_directory import save_tiny_mixtral

from pikv_megatron import PiKVConfig
from pikv_megatron.calibration.tune_options import parse_tuning

PROGRAM = Path(__file__).parents[2] / "launch/tune.py"
SIZES = (
    "shard_after: 0\npage_size: 8\nnum_sinks: 2\nwindow: 8\nflush_interval: 3\n"
    "prefill_chunk_size: 16\n"
)
CHOICES = {
    "near": "retention: streaming\nbudget: {name: pages, pages: 1}\n",
    "int4": "codec: {format: int4}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_tiny_mixtral(folder / "model")
    for name, methods in CHOICES.items():
        (folder / f"{name}.yaml").write_text(SIZES + methods)
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    caches = [str(folder / f"{name}.yaml") for name in CHOICES]
    return [
        "--model", str(folder / "model"), "--pikv", *caches, "--tasks", "text", "--length", "128",
        "--samples", "2", *more,
    ]


def test_layers_take_what_costs_least_within_the_budget(folder):
    output = folder / "tuned.yaml"
    done = run_alone(PROGRAM, *arguments(folder, "--share", "1.2", "--output", str(output)))
    assert done.returncode == 0, done.stderr
    cell = r"([\d.]+) \(([\d.]+)\)"
    rows = re.findall(rf"^ (\d) +{cell} +{cell} +(\w+) *$", done.stdout, re.MULTILINE)
    assert [layer for layer, *_ in rows] == ["0", "1"]
    for _, near, near_saved, int4, int4_saved, chosen in rows:
        assert float(near) > float(int4) > 0 and float(near_saved) > 0 < float(int4_saved)
        assert chosen in (*CHOICES, "lossless")
    pikv = PiKVConfig.from_file(output)
    assert {"page_size", "layers"} <= yaml.safe_load(output.read_text()).keys() <= {
        "page_size", "layers", "shard_after", "num_sinks", "window", "flush_interval",
        "prefill_chunk_size",
    }
    named = {layer: name for layer, *_, name in rows if name != "lossless"}
    assert set(named) == {layer for part in pikv.layers for layer in part.match.split(",")}
    for part in pikv.layers:
        is_near = named[part.match[0]] == "near"
        assert (part.retention is not None) == is_near and (part.codec is None) == is_near
    held = re.search(r"^ tuned +.*? ([\d.]+) \(1/[\d.]+\)", done.stdout, re.MULTILINE)
    assert float(held[1]) <= 1.2


def test_costs_alone_are_printed_without_a_budget(folder):
    done = run_alone(PROGRAM, *arguments(folder), "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    assert "chosen" not in done.stdout and "Accuracy" not in done.stdout
    again = run_alone(PROGRAM, *arguments(folder, "--share", "0.01", "--out", str(folder / "out")))
    assert again.returncode == 2 and "text:" not in again.stderr, "measured twice"
    assert "--share 0.01: layer by layer, the smallest of these caches hold" in again.stderr


def test_what_cannot_be_tuned_is_refused(folder):
    with pytest.raises(ValueError, match="--output: nothing is chosen without --share"):
        parse_tuning(arguments(folder, "--output", str(folder / "x.yaml")))
