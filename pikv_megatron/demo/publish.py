"""The trained model as a Hugging Face directory, and what it can do once read back from there."""

import json
from functools import partial
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from pikv_megatron.checkpoint.architecture import Architecture
from pikv_megatron.checkpoint.export import save_huggingface
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.demo.batches import text_bytes
from pikv_megatron.demo.causal_attention import with_causal_attention
from pikv_megatron.demo.evaluation import RecallResult, evaluate_recall, text_perplexity
from pikv_megatron.demo.tokenizer import EOS_ID, PAD_ID, SPECIAL_TOKENS, byte_tokenizer
from pikv_megatron.demo.training import forward

# Tokens of a sequence to the pairs in it.
RECALL_PAIRS = {128: 8, 256: 16, 512: 32, 1024: 32, 2048: 32}
NUM_QUERIES = 1024
PERPLEXITY_LENGTHS = (512, 1024, 2048)
PERPLEXITY_BYTES = 2**16


def save_directory(model: GPTModel, architecture: Architecture, directory: Path) -> None:
    """Write weights in the architecture's type, configs and tokenizer, as transformers reads them.

    Args:
        model: trained, on one rank.
        architecture: what it was built from.
        directory: made if missing; files of the same names are replaced.
    """
    save_huggingface(model, architecture, directory, architecture.torch_dtype)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": architecture.max_sequence_length,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    generation_config = {
        "bos_token_id": architecture.bos_id, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID
    }
    _write_json(directory / "generation_config.json", generation_config)


def measure(
    directory: Path, pg_collection: ProcessGroupCollection, held_out: Tensor
) -> tuple[list[RecallResult], dict[int, float]]:
    """Read the saved weights back and compute in float32.

    Args:
        directory: what `save_directory` wrote.
        pg_collection: of one rank.
        held_out: token ids `[tokens]` of text that training never saw.

    Returns:
        Recall by length, and the perplexity per byte by length of the windows.
    """
    model = load_huggingface(directory, pg_collection, torch.float32, with_causal_attention)
    run = partial(forward, model)
    text = text_bytes(held_out)
    recall = [
        evaluate_recall(run, text, length, num_pairs, NUM_QUERIES)
        for length, num_pairs in RECALL_PAIRS.items()
    ]
    perplexity = {
        length: text_perplexity(run, held_out, length, 2 * PERPLEXITY_BYTES // length)
        for length in PERPLEXITY_LENGTHS
    }
    return recall, perplexity


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
