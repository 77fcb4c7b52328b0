"""A small random Mixtral directory with a byte-level tokenizer, as a user would have it."""

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM

EOS = 256
MAX_LENGTH = 256


def save_tiny_mixtral(directory: Path) -> None:
    """Two layers, four experts, four query and two key-value heads; bytes and an end token."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=EOS + 1, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=MAX_LENGTH, initializer_range=0.2, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=None,
    )
    MixtralForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer
