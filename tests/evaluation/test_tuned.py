"""What is tuned to the demo model keeps what it promises, on two ranks."""

from pathlib import Path

import torch
from ranks import run_ranks

from pikv_megatron import PiKVConfig, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.demo.tokenizer import VOCAB_SIZE
from pikv_megatron.evaluation.evaluator import Evaluator, lossless
from pikv_megatron.evaluation.figures import Figures
from pikv_megatron.evaluation.judge import Reference
from pikv_megatron.evaluation.tasks.base import Source
from pikv_megatron.evaluation.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
MODEL, FILE = ROOT / "models/demo", ROOT / "configs/tuned/demo_balanced.yaml"
LENGTH, SAMPLES, BATCH_SIZE = 2048, 24, 16


def evaluate(num_ranks: int) -> list[Figures]:
    """The lossless cache and the tuned one, as they would be used: in bfloat16."""
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as groups:
        model = load_huggingface(
            MODEL, groups, torch.bfloat16,
            spec_transform=lambda spec: pikv_layer_spec(spec, PiKVConfig()),
        ).eval()
        evaluator, reference = Evaluator(model, VOCAB_SIZE, BATCH_SIZE), Reference()
        source = Source(Tokenizer.from_directory(MODEL), is_bytewise=True)
        parts, pikv = TASKS["recall"].build(source, LENGTH, SAMPLES, 0), PiKVConfig.from_file(FILE)
        return [evaluator.run(parts, p, reference, lambda: None) for p in (lossless(pikv), pikv)]


def test_balanced_keeps_a_twelfth_a_rank_and_recalls():
    """A sixth in all, of which each rank has half. What is recalled from is the library of the
    Python that runs this."""
    whole, tuned = run_ranks(evaluate, 2, 2, timeout=240)[0]
    assert tuned.held_share <= 1 / 12
    assert whole.accuracy >= 0.95 and tuned.accuracy >= whole.accuracy - 0.05
