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

from pikv_megatron import PiKVConfig, PiKVInferenceContext, process_groups

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
        controller = TextGenerationController(wrapper(model, context), Numbers())
        engine = StaticInferenceEngine(controller, max_batch_size=4, random_seed=7, legacy=True)
        flags = []
        for _ in range(2):  # the second batch reuses the context
            done = engine.generate(
                prompts=PROMPTS,
                sampling_params=SamplingParams(num_tokens_to_generate=8, top_k=1),
            )
            flags.append([list(map(int, r.generated_tokens)) for r in done] == expected)
            context.check_integrity()
        return flags


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_greedy_tokens_are_those_of_the_model_without_a_cache(num_ranks):
    assert all(all(flags) for flags in run_ranks(generate, num_ranks, num_ranks))
