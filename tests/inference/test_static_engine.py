"""Megatron's own static engine drives a PiKV model."""

from pathlib import Path

import pytest
from parity_models import VOCAB, build, draw_weights, plain_logits
from ranks import run_ranks
from static_engine import Numbers, engine_tokens
from test_methods import METHODS, calibration, config_of

from pikv_megatron import PiKVConfig, PiKVForCausalLM, PiKVInferenceContext, process_groups

PIKV = PiKVConfig(shard_after=0, page_size=3, window=4, num_sinks=1, flush_interval=2)
# A budget of bytes is divided by the sequences that there is room for, which the two count apart;
# of pages in a file, the engine could not say that they are lost.
APART = "budget bytes", "selector budget over tiers"
COMPARED = {name: fields for name, fields in METHODS.items() if name not in APART}
PROMPTS = ["5 9 2", "7 7 7 7 7 7 7 7 7 7 7 7", "3 1 4 1 5"]


def generate(expert_parallel_size: int) -> list[bool]:
    with process_groups(expert_parallel_size=expert_parallel_size, timeout_seconds=60) as pg:
        model = build(pg, PIKV)
        context = PiKVInferenceContext.for_model(model, PIKV, 4, 64)
        expected = []
        for prompt in PROMPTS:
            tokens = Numbers(VOCAB).tokenize(prompt)
            for _ in range(8):
                tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
            expected.append(tokens[-8:])
        # The second batch reuses the context.
        return [engine_tokens(model, context, PROMPTS, VOCAB) == expected for _ in range(2)]


def generate_with_methods(expert_parallel_size: int, file: Path) -> dict[str, bool]:
    """Whether the engine's tokens are those of our own `generate`, for prompts of one length.

    Token 0, its beginning of a text, would be dropped by the engine.
    """
    same = {}
    with process_groups(expert_parallel_size=expert_parallel_size, timeout_seconds=60) as pg:
        prompts = [[(7 * i + j) % (VOCAB - 1) + 1 for i in range(50)] for j in range(2)]
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        for name, fields in COMPARED.items():
            sizes = dict(
                shard_after=0, page_size=4, window=4, num_sinks=1, flush_interval=2, token_shards=4
            )
            config = config_of(fields, file, sizes)
            model = build(pg, config)
            draw_weights(model, pg.ep.rank())
            context = PiKVInferenceContext.for_model(model, config, 4, 64)
            tokens = engine_tokens(model, context, texts, VOCAB)
            # Megatron's engine runs every prompt on every rank.
            every = [prompt for prompt in prompts for _ in range(expert_parallel_size)]
            own = PiKVForCausalLM(model, config).generate(every, max_new_tokens=8).token_ids
            same[name] = tokens == own[::expert_parallel_size]
    return same


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_tokens_are_those_of_the_model_without_a_cache(num_ranks):
    assert all(all(flags) for flags in run_ranks(generate, num_ranks, num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_method_acts_under_megatrons_engine(num_ranks, calibration):  # noqa: F811
    for same in run_ranks(generate_with_methods, num_ranks, num_ranks, calibration, timeout=200):
        assert same == dict.fromkeys(COMPARED, True)
