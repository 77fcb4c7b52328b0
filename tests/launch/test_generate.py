"""launch/generate.py under the real deepspeed launcher, on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from launcher import launch
from tiny_directory import save_tiny_mixtral
from transformers import MixtralForCausalLM

from pikv_megatron.inference import program

ROOT = Path(__file__).parents[2]
PROMPTS = ["def read(path):\n    return", "é"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_mixtral(directory)
    return directory


def generate(*arguments: str) -> subprocess.CompletedProcess:
    return launch(ROOT / "launch/generate.py", *arguments, timeout=240)


def test_greedy_tokens_are_those_of_transformers(model, tmp_path):
    output = tmp_path / "out.jsonl"
    config = tmp_path / "small_pages.yaml"  # so that tokens really leave for the other rank
    config.write_text("shard_after: 0\npage_size: 2\nnum_sinks: 1\nwindow: 3\nflush_interval: 2\n")
    run = generate(
        "--model", str(model), "--pikv", str(config), "--prompt", PROMPTS[0],
        "--prompt", PROMPTS[1], "--max-new-tokens", str(NEW_TOKENS), "--output", str(output),
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    reference = MixtralForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in rows:
        assert list(row) == ["prompt", "text", "token_ids", "logprobs"]
        ids, logprobs = reference_tokens(reference, model, row["prompt"])
        assert row["token_ids"] == ids
        assert row["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert row["prompt"] + row["text"] in run.stdout
    assert "tokens per second" in run.stdout and "pikv_combine" in run.stdout
    combine = next(line for line in run.stdout.splitlines() if "pikv_combine" in line)
    assert " 0 bytes" not in combine


@torch.no_grad()
def reference_tokens(reference, model: Path, prompt: str) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers, and their log-probabilities, without any cache."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids, logprobs = tokenizer.encode(prompt).ids, []
    num_prompt_tokens = len(ids)
    while len(logprobs) < NEW_TOKENS:
        logits = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids = ids + [int(logits.argmax())]
        logprobs.append(float(logits.max()))
        if ids[-1] in (reference.config.eos_token_id,):
            break
    return ids[num_prompt_tokens:], logprobs


def test_wrong_input_ends_with_one_line_and_code_2(model):
    run = generate("--model", str(model), "--prompt", "a", "--top-p", "3")
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "--top-p 3" in lines[0]
    assert "Traceback" not in run.stderr + run.stdout


def test_without_the_launcher_it_says_how_to_start(model):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    run = subprocess.run(
        [sys.executable, str(ROOT / "launch/generate.py"), "--model", str(model), "--prompt", "a"],
        capture_output=True, text=True, timeout=120, env=environment,
    )
    assert run.returncode == 2
    assert "error: start it with: deepspeed" in run.stderr


def test_an_error_of_another_rank_alone_is_not_lost(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(program.time, "sleep", slept.append)
    for local_rank, patience in (("0", []), ("1", [program.PATIENCE_SECONDS])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        slept.clear()
        assert program.refuse(ValueError("shard 3\n is cut")) == 2
        assert capsys.readouterr().err == "error: shard 3 is cut\n" and slept == patience
