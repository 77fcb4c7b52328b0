"""What a user would run instead: Hugging Face's own model on the same weights.

Legend: L tokens of the longest sequence, n sequences, ng KV heads, hn head width.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from megatron.core.models.gpt import GPTModel

from pikv_megatron.benchmarks.model.decoding import Contestant
from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.export import save_huggingface


def transformers_model(
    model: GPTModel, architecture: Architecture, checkpoint: Path | None, dtype: torch.dtype
) -> torch.nn.Module:
    """The model of `transformers`, with its defaults.

    Args:
        model: whose weights it gets.
        checkpoint: their Hugging Face directory; None: it is written first.
    """
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as directory:
        if checkpoint is None:
            save_huggingface(model, architecture, directory, dtype)
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint or directory, dtype=dtype)
    return loaded.eval().to(next(model.parameters()).device)


class TransformersContestant(Contestant):
    """`transformers` and its dynamic cache, on one rank. All sequences have one length."""

    def fill(self, layers):
        self._cache = self._new_cache()
        for number, layer in enumerate(layers):
            keys, values = (x.permute(1, 2, 0, 3).contiguous() for x in (layer.keys, layer.values))
            self._cache.update(keys, values, number)

    def step(self, tokens):
        ids = tokens.to(self.device).unsqueeze(1)
        return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits[:, -1]

    def prefill(self, prompt):
        self.model(
            input_ids=prompt.to(self.device).unsqueeze(0), past_key_values=self._new_cache(),
            use_cache=True, logits_to_keep=1,
        )

    def cache_bytes(self):
        return sum(t.nbytes for layer in self._cache.layers for t in (layer.keys, layer.values))

    def attention_bounds(self):
        for layer in self.model.model.layers:
            yield layer.self_attn.v_proj, layer.self_attn.o_proj

    def _new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)
