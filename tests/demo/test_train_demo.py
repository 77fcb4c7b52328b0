"""launch/train_demo.py, with few steps and small measurements."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.demo import publish

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "launch/train_demo.py"


@pytest.fixture
def program(monkeypatch):
    """The program as a module; what it measures is cut down."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(publish, "RECALL_PAIRS", {64: 4})
    monkeypatch.setattr(publish, "NUM_QUERIES", 16)
    monkeypatch.setattr(publish, "PERPLEXITY_LENGTHS", (64,))
    monkeypatch.setattr(publish, "PERPLEXITY_BYTES", 256)
    spec = importlib.util.spec_from_file_location("train_demo_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_trains_saves_and_measures(program, one_thread, monkeypatch, tmp_path, capsys):
    small = yaml.safe_load((ROOT / "configs/model/demo.yaml").read_text())
    small |= {"num_layers": 1, "moe_ffn_hidden_size": 32}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    output = tmp_path / "deep/model"
    arguments = ["--output", str(output), "--model", str(tmp_path / "small.yaml")]
    arguments += ["--scale", "0.001", "--seed", "3", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *arguments])
    assert program.main() == 0
    assert read_architecture(output) == Architecture(**small)
    record = json.loads((output / "training.json").read_text())
    assert record["seed"] == 3 and record["curve"][-1]["stage"] == 4
    assert [result["length"] for result in record["recall"]] == [64]
    assert record["perplexity"]["64"] < 320 * 2
    assert record["weight_bytes"] == (output / "model.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert "Exact recall" in printed and f"{record['perplexity']['64']:.3f}" in printed


def test_bad_input_ends_with_one_line_and_code_2(program, monkeypatch, tmp_path, capsys):
    output = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--output", str(output), "--scale", "-1"])
    assert program.main() == 2 and not output.exists()
    assert capsys.readouterr().err == "error: --scale -1.0 must lie above 0, and not above 10\n"
