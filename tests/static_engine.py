"""Megatron-Core's own static engine over a PiKV context."""

from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)


class Numbers:
    """A tokenizer whose text is the token ids."""

    bos = 0

    def __init__(self, vocab_size: int):
        self.vocab_size, self.eod = vocab_size, vocab_size + 1

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, ids, **kwargs):
        return " ".join(map(str, ids))


def wrapper(model, context, vocab_size):
    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
            InferenceWrapperConfig,
        )
    except ImportError:
        return GPTInferenceWrapper(model, context)
    config = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size, params_dtype=model.config.params_dtype,
        padded_vocab_size=vocab_size, inference_batch_times_seqlen_threshold=-1,
        inference_max_requests=4,
        inference_max_seq_length=context.max_sequence_length,
    )
    return GPTInferenceWrapper(model, config, inference_context=context)


def engine_tokens(model, context, prompts: list[str], vocab_size: int) -> list[list[int]]:
    """Eight greedy tokens of each prompt."""
    inner = wrapper(model, context, vocab_size)
    controller = TextGenerationController(inner, Numbers(vocab_size))
    engine = StaticInferenceEngine(controller, max_batch_size=4, random_seed=7, legacy=True)
    done = engine.generate(
        prompts=prompts, sampling_params=SamplingParams(num_tokens_to_generate=8, top_k=1)
    )
    context.check_integrity()
    return [list(map(int, r.generated_tokens)) for r in done]
