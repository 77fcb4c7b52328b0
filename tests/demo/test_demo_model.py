"""The committed model: small, readable by transformers, and as good as its record says."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralForCausalLM

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.batches import text_bytes
from pikv_megatron.demo.corpus import load_corpus
from pikv_megatron.demo.evaluation import evaluate_recall, text_perplexity
from pikv_megatron.demo.tokenizer import BOS_ID, EOS_ID, byte_tokenizer
from pikv_megatron.demo.training import forward

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/demo"
RECORD = json.loads((MODEL / "training.json").read_text())
FRESH_SEED = 20_240  # the record was measured on seed 0


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return load_corpus(held_out=True)


@pytest.fixture(scope="module")
def run(one_rank):
    return partial(forward, load_huggingface(MODEL, one_rank, torch.float32))


def test_it_is_small():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert (MODEL / "model.safetensors").stat().st_size == RECORD["weight_bytes"]


def test_it_is_what_its_configuration_describes():
    assert read_architecture(MODEL) == Architecture.from_yaml(
        ROOT / "configs/model/demo.yaml"
    )


def test_it_recalls_at_every_position(run, held_out):
    result = evaluate_recall(run, text_bytes(held_out), 512, 32, 512, seed=FRESH_SEED)
    assert result.num_queries == 512 and min(result.by_position) >= 0.95, result


def test_its_perplexity_is_the_stated_one(run, held_out):
    found = text_perplexity(run, held_out, 512, 64)
    assert found <= 1.1 * RECORD["perplexity"]["512"]


@torch.no_grad()
def test_transformers_agrees(run):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "@a7;def read(path):\n    return open(path).read()  # é\n" * 5 + "@a"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == list(text.encode()) and tokenizer.decode(ids[0]) == text
    expected = MixtralForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(ids).logits
    found = run(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert chr(found[0, -1].argmax()) == "7"


def test_its_tokenizer_is_the_byte_one():
    tokenizer = Tokenizer.from_directory(MODEL)
    assert tokenizer.backend.to_str() == byte_tokenizer().to_str()
    assert tokenizer.eos_ids == (EOS_ID,) and tokenizer.bos_id == BOS_ID


def test_its_readme_states_its_record():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", _readme(), re.MULTILINE)
    stated = [tuple(map(float, row)) for row in rows]
    assert stated == [
        (r["length"], r["num_pairs"], percent(r["accuracy"]), percent(min(r["by_position"])))
        for r in RECORD["recall"]
    ]
    for value in RECORD["perplexity"].values():
        assert f"{value:.3f}" in _readme()


def percent(share: float) -> float:
    return round(100 * share, 1)


def _readme() -> str:
    return (MODEL / "README.md").read_text()
