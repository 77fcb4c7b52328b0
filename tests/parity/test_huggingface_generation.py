"""Imported models give transformers' logits and greedy tokens, through the sharded cache."""

from pathlib import Path

import deepspeed
import pytest
import torch
from parity_models import cached_logits
from ranks import run_ranks
from static_engine import engine_tokens
from tiny_models import (
    FAMILIES,
    GROUPED,
    VOCAB_SIZE,
    glm4_moe,
    gpt_oss,
    mixtral,
    qwen2_moe,
)

from pikv_megatron import (
    PiKVConfig,
    PiKVForCausalLM,
    PiKVInferenceContext,
    pikv_layer_spec,
    process_groups,
)
from pikv_megatron.checkpoint.huggingface import load_huggingface

PIKV = PiKVConfig(
    shard_after=0, page_size=4, window=8, num_sinks=2, flush_interval=4, expert_shards=4,
    replicas=2, prefill_chunk_size=24,
)
STOCK_EXPERTS = PIKV.model_copy(update={"lean_experts": False})
LENS = 40, 7, 65  # ragged, and the last one fed in pieces
WIDE = "gpt_oss_wide"  # its windows are of 128 tokens
WIDE_LENS = 310, 7, 140
NUM_FED, NUM_NEW, NUM_NEXT, NUM_STATIC = 6, 32, 6, 8
MODELS = {make.__name__: make for make in FAMILIES}
MODELS["glm4_moe_grouped"] = lambda: glm4_moe(**GROUPED)
MODELS["mixtral_sliding"] = lambda: mixtral(sliding_window=9)
MODELS["qwen2_moe_sliding"] = lambda: qwen2_moe(use_sliding_window=True, sliding_window=9)
MODELS[WIDE] = lambda: gpt_oss(sliding_window=128, max_position_embeddings=512)


def drawn(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def prompts_of(name: str) -> list[list[int]]:
    return [drawn(length, length) for length in (WIDE_LENS if name == WIDE else LENS)]


def fed_to(name: str) -> list[list[int]]:
    return [prompt + drawn(NUM_FED, 200) for prompt in prompts_of(name)]


TURNS = [drawn(5, 100 + length) for length in LENS]
STATIC = [drawn(length, 300) for length in (40, 37)]


@torch.no_grad()
def reference_logits(model, sequence: list[int]) -> torch.Tensor:
    """[s, vocab]"""
    return model(torch.tensor([sequence])).logits[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Where the models are, they themselves, and their logits for what is fed to them."""
    root = tmp_path_factory.mktemp("models")
    models = {name: make() for name, make in MODELS.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    logits = {
        name: [reference_logits(model, fed) for fed in fed_to(name)]
        for name, model in models.items()
    }
    return root, models, logits


def difference(model, pikv: PiKVConfig, name: str, expected: list[torch.Tensor]) -> float:
    """Largest of all logits of this rank's sequences, fed in pieces and then token by token."""
    context = PiKVInferenceContext.for_model(model, pikv, len(LENS), 512)
    fed = fed_to(name)
    lens = [len(sequence) - NUM_FED for sequence in fed]
    found = cached_logits(model, context, fed, lens, PIKV.prefill_chunk_size)
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
            kinds = [PIKV] if num_ranks > 2 else [STOCK_EXPERTS, PIKV]
            for pikv in kinds:
                model = load_huggingface(
                    root / name, pg, torch.float32, lambda spec: pikv_layer_spec(spec, pikv)
                )
                differences.append(difference(model, pikv, name, logits))
            lm = PiKVForCausalLM(model, PIKV, vocab_size=VOCAB_SIZE)
            engine = deepspeed.init_inference(lm, dtype=torch.float32)
            prompts = prompts_of(name)
            first = engine.generate(prompts, max_new_tokens=NUM_NEW, keep_cache=True)
            second = engine.generate(TURNS, max_new_tokens=NUM_NEXT, resume=True)
            tokens = first.token_ids, second.token_ids, static_tokens(model)
            result[name] = differences, *tokens
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
        for prompt, tokens, turn, new in zip(prompts_of(name), first, TURNS, second):
            assert len(tokens) == NUM_NEW and is_greedy(model, prompt, tokens), name
            assert len(new) == NUM_NEXT and is_greedy(model, prompt + tokens + turn, new), name
        for prompt, tokens in zip(STATIC, static):
            assert is_greedy(model, prompt, tokens), name
