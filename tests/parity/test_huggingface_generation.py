"""Imported models give transformers' logits and greedy tokens, through the sharded cache."""

from pathlib import Path

import deepspeed
import pytest
import torch
from parity_models import cached_logits
from ranks import run_ranks
from static_engine import engine_tokens
from tiny_models import FAMILIES, GROUPED, VOCAB_SIZE, glm4_moe

from pikv_megatron import (
    PiKVConfig,
    PiKVForCausalLM,
    PiKVInferenceContext,
    pikv_layer_spec,
    process_groups,
)
from pikv_megatron.checkpoint.huggingface import load_huggingface

PIKV = PiKVConfig(
    page_size=4, window=8, num_sinks=2, flush_interval=4, expert_shards=4, replicas=2,
    prefill_chunk_size=24,
)
LENS = (40, 7, 65)  # ragged, and the last one fed in pieces
NUM_FED, NUM_NEW, NUM_NEXT, NUM_STATIC = 6, 32, 6, 8
MODELS = {make.__name__: make for make in FAMILIES}
MODELS["glm4_moe_grouped"] = lambda: glm4_moe(**GROUPED)


def drawn(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


PROMPTS = [drawn(length, length) for length in LENS]
TURNS = [drawn(5, 100 + length) for length in LENS]
FED = [prompt + drawn(NUM_FED, 200) for prompt in PROMPTS]
STATIC = [drawn(length, 300) for length in (40, 37)]


@torch.no_grad()
def reference_logits(model, sequence: list[int]) -> torch.Tensor:
    """[s, vocab]"""
    return model(torch.tensor([sequence])).logits[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Where the models are, they themselves, and their logits for `FED`."""
    root, models = tmp_path_factory.mktemp("models"), {name: make() for name, make in MODELS.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    logits = {n: [reference_logits(model, fed) for fed in FED] for n, model in models.items()}
    return root, models, logits


def difference(model, pikv: PiKVConfig, expected: list[torch.Tensor]) -> float:
    """Largest of all logits of this rank's sequences, fed in pieces and then token by token."""
    context = PiKVInferenceContext.for_model(model, pikv, len(PROMPTS), 256)
    found = cached_logits(model, context, FED, list(LENS), PIKV.prefill_chunk_size)
    rows = ((own[:, :VOCAB_SIZE] - expected[i]).abs().max() for i, own in found.items())
    return max((float(row) for row in rows), default=0.0)


def static_tokens(model) -> list[list[int]]:
    """What Megatron's own engine makes of prompts."""
    context = PiKVInferenceContext.for_model(model, PIKV, 4, 128)
    texts = [" ".join(map(str, prompt)) for prompt in STATIC]
    return engine_tokens(model, context, texts, model.vocab_size)


def run(root: Path, expected: dict, num_ranks: int) -> dict:
    """By model: differences of logits, and the tokens of two turns and of Megatron's engine."""
    result = {}
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for name, logits in expected.items():
            differences = []
            for pikv in (PIKV.model_copy(update={"lean_experts": False}), PIKV):
                model = load_huggingface(
                    root / name, pg, torch.float32, lambda spec: pikv_layer_spec(spec, pikv)
                )
                differences.append(difference(model, pikv, logits))
            lm = PiKVForCausalLM(model, PIKV, vocab_size=VOCAB_SIZE)
            engine = deepspeed.init_inference(lm, dtype=torch.float32)
            first = engine.generate(PROMPTS, max_new_tokens=NUM_NEW, keep_cache=True).token_ids
            second = engine.generate(TURNS, max_new_tokens=NUM_NEXT, resume=True).token_ids
            result[name] = differences, first, second, static_tokens(model)
    return result


def is_greedy(model, past: list[int], new: list[int]) -> bool:
    """Whether transformers would have chosen the same tokens."""
    chosen = reference_logits(model, past + new)[len(past) - 1 : -1].argmax(-1)
    return chosen.tolist() == new


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_family_is_transformers(saved, num_ranks):
    root, models, logits = saved
    results = run_ranks(run, num_ranks, root, logits, num_ranks, timeout=280)
    for name, model in models.items():
        assert max(max(result[name][0]) for result in results) < 1e-4, name
        assert all(result[name][1:] == results[0][name][1:] for result in results), name
        _, first, second, static = results[0][name]
        for prompt, tokens, turn, new in zip(PROMPTS, first, TURNS, second):
            assert len(tokens) == NUM_NEW and is_greedy(model, prompt, tokens), name
            assert len(new) == NUM_NEXT and is_greedy(model, prompt + tokens + turn, new), name
        for prompt, tokens in zip(STATIC, static):
            assert is_greedy(model, prompt, tokens), name
