"""Greedy tokens of imported models equal those of transformers, through the sharded cache."""

from pathlib import Path

import deepspeed
import pytest
import torch
from ranks import run_ranks
from tiny_models import VOCAB_SIZE, mixtral, olmoe, qwen3_moe

from pikv_megatron import PiKVConfig, PiKVForCausalLM, pikv_layer_spec, process_groups
from pikv_megatron.checkpoint.huggingface import load_huggingface

PIKV = PiKVConfig(page_size=4, window=8, num_sinks=2, flush_interval=4, expert_shards=4, replicas=2)
PROMPTS = torch.randint(3, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(2))
NUM_NEW = 32


@torch.no_grad()
def save_and_generate(root: Path) -> dict[str, list[list[int]]]:
    tokens = {}
    for make in (mixtral, qwen3_moe, olmoe):
        model = make()
        model.generation_config.eos_token_id = None
        model.save_pretrained(root / make.__name__)
        out = model.generate(
            PROMPTS, attention_mask=torch.ones_like(PROMPTS), do_sample=False,
            max_new_tokens=NUM_NEW,
        )
        tokens[make.__name__] = out[:, PROMPTS.shape[1] :].tolist()
    return tokens


def generate(root: Path, names: list[str], num_ranks: int) -> dict[str, list[list[int]]]:
    tokens = {}
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for name in names:
            model = load_huggingface(
                root / name, pg, torch.float32, lambda spec: pikv_layer_spec(spec, PIKV)
            )
            lm = PiKVForCausalLM(model, PIKV, vocab_size=VOCAB_SIZE)
            engine = deepspeed.init_inference(lm, dtype=torch.float32)
            tokens[name] = engine.generate(PROMPTS.tolist(), max_new_tokens=NUM_NEW).token_ids
    return tokens


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_tokens_equal_those_of_transformers(tmp_path, num_ranks):
    expected = save_and_generate(tmp_path)
    for tokens in run_ranks(generate, num_ranks, tmp_path, list(expected), num_ranks):
        assert tokens == expected
