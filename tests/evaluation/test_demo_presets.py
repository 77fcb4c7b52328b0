"""What the presets promise, on the demo model: recall and text with a small part of the pages."""

from pathlib import Path

import pytest
import torch

from pikv_megatron import PiKVConfig, pikv_layer_spec
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.tokenizer import VOCAB_SIZE
from pikv_megatron.evaluation.byte_ids import ByteIds
from pikv_megatron.evaluation.evaluator import LOSSLESS, Evaluator, lossless
from pikv_megatron.evaluation.figures import Evaluation
from pikv_megatron.evaluation.report import change
from pikv_megatron.evaluation.task import RECALL, build_tasks

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/demo"
LENGTH, QUESTIONS, TEXTS = 1024, 64, 8
PRESETS = "low_rank_16th", "low_rank_mass", "low_rank_8th_tail"
# What files of configs/methods may cost of perplexity, and how many times smaller pages are.
CODECS = {
    "int8": (0.001, 3.0), "int4": (0.002, 5.0), "k4_v2": (0.005, 6.0), "budget_150": (0.01, 9.0),
}


@pytest.fixture(scope="module")
def evaluations(one_rank) -> dict[str, Evaluation]:
    model = load_huggingface(
        MODEL, one_rank, torch.float32,
        spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
    ).eval()
    byte_ids = ByteIds(Tokenizer.from_directory(MODEL))
    tasks = build_tasks(byte_ids, LENGTH, QUESTIONS, TEXTS)
    evaluator = Evaluator(model, VOCAB_SIZE, tasks, batch_size=8)
    caches = {name: PiKVConfig(preset=name) for name in PRESETS}
    files = {name: ROOT / f"configs/methods/{name}.yaml" for name in CODECS}
    caches |= {name: PiKVConfig.from_file(file) for name, file in files.items()}
    caches = {LOSSLESS: lossless(caches[PRESETS[0]]), **caches}
    return {name: evaluator.run(name, pikv, lambda: None) for name, pikv in caches.items()}


@pytest.mark.parametrize("name", [*PRESETS, *CODECS])
def test_recall_is_that_of_the_lossless_cache(evaluations, name):
    found, whole = (evaluations[n].figures[RECALL].accuracy for n in (name, LOSSLESS))
    assert found >= whole - 0.01 and whole >= 0.98


@pytest.mark.parametrize(
    "name, most", [("low_rank_mass", 0.005), ("low_rank_8th_tail", 0.01)]
)
def test_text_costs_little(evaluations, name, most):
    assert change(evaluations[name], evaluations[LOSSLESS]) <= most


@pytest.mark.parametrize("name", CODECS)
def test_codecs_cost_little_and_save_much(evaluations, name):
    most, times = CODECS[name]
    assert change(evaluations[name], evaluations[LOSSLESS]) <= most
    assert evaluations[LOSSLESS].token_bytes >= times * evaluations[name].token_bytes


def test_a_small_part_is_read(evaluations):
    """Budgets are rounded up to whole pages; what the mass needs differs by layer."""
    for name, share in (("low_rank_16th", 1 / 16), ("low_rank_8th_tail", 1 / 8)):
        for figures in evaluations[name].figures.values():
            assert all(share <= read < share + 0.02 for read in figures.pages_read)
    by_layer = evaluations["low_rank_mass"].figures[RECALL].pages_read
    assert max(by_layer) < 0.8 and min(by_layer) < max(by_layer) / 2
