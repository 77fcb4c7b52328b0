"""Megatron's own static engine drives a PiKV model."""

import pytest
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from parity_models import VOCAB, build, plain_logits
from ranks import run_ranks
from test_methods import METHODS

from pikv_megatron import PiKVConfig, PiKVForCausalLM, PiKVInferenceContext, process_groups

PIKV = PiKVConfig(page_size=3, window=4, num_sinks=1, flush_interval=2)
PROMPTS = ["5 9 2", "7 7 7 7 7 7 7 7 7 7 7 7", "3 1 4 1 5"]


class Numbers:
    """A tokenizer whose text is the token ids."""

    vocab_size, bos, eod = VOCAB, 0, VOCAB + 1

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, ids, **kwargs):
        return " ".join(map(str, ids))


def wrapper(model, context):
    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
            InferenceWrapperConfig,
        )
    except ImportError:
        return GPTInferenceWrapper(model, context)
    config = InferenceWrapperConfig(
        hidden_size=32, params_dtype=model.config.params_dtype, padded_vocab_size=VOCAB,
        inference_batch_times_seqlen_threshold=-1, inference_max_requests=4,
        inference_max_seq_length=64,
    )
    return GPTInferenceWrapper(model, config, inference_context=context)


def engine_tokens(model, context, prompts: list[str]) -> list[list[int]]:
    controller = TextGenerationController(wrapper(model, context), Numbers())
    engine = StaticInferenceEngine(controller, max_batch_size=4, random_seed=7, legacy=True)
    done = engine.generate(
        prompts=prompts, sampling_params=SamplingParams(num_tokens_to_generate=8, top_k=1)
    )
    context.check_integrity()
    return [list(map(int, r.generated_tokens)) for r in done]


def generate(expert_parallel_size: int) -> list[bool]:
    with process_groups(expert_parallel_size=expert_parallel_size, timeout_seconds=60) as pg:
        model = build(pg, PIKV)
        context = PiKVInferenceContext.for_model(model, PIKV, 4, 64)
        expected = []
        for prompt in PROMPTS:
            tokens = Numbers().tokenize(prompt)
            for _ in range(8):
                tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
            expected.append(tokens[-8:])
        # The second batch reuses the context.
        return [engine_tokens(model, context, PROMPTS) == expected for _ in range(2)]


def generate_with_methods(expert_parallel_size: int) -> dict[str, bool]:
    """Whether the engine's tokens are those of our own `generate`, for prompts of one length.

    Token 0, its beginning of a text, would be dropped by the engine.
    """
    same = {}
    with process_groups(expert_parallel_size=expert_parallel_size, timeout_seconds=60) as pg:
        prompts = [[(7 * i + j) % (VOCAB - 1) + 1 for i in range(50)] for j in range(2)]
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        for name, fields in METHODS.items():
            sizes = dict(page_size=4, window=4, num_sinks=1, flush_interval=2, token_shards=4)
            config = PiKVConfig(**sizes | fields)
            model = build(pg, config)
            context = PiKVInferenceContext.for_model(model, config, 4, 64)
            tokens = engine_tokens(model, context, texts)
            # Megatron's engine runs every prompt on every rank.
            every = [prompt for prompt in prompts for _ in range(expert_parallel_size)]
            own = PiKVForCausalLM(model, config).generate(every, max_new_tokens=8).token_ids
            same[name] = tokens == own[::expert_parallel_size]
    return same


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_tokens_are_those_of_the_model_without_a_cache(num_ranks):
    assert all(all(flags) for flags in run_ranks(generate, num_ranks, num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_method_acts_under_megatrons_engine(num_ranks):
    for same in run_ranks(generate_with_methods, num_ranks, num_ranks, timeout=200):
        assert same == dict.fromkeys(METHODS, True)
