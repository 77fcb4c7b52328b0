"""Tokenizers of Hugging Face directories, and Megatron-Core's names for the same."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from pikv_megatron.checkpoint.tokenizer import Tokenizer

BOS, EOS = 256, 257


def save(directory: Path, **configs: dict) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    backend.save(str(directory / "tokenizer.json"))
    for name, config in configs.items():
        (directory / f"{name}.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    config = {"eos_token_id": EOS, "bos_token_id": BOS}
    return save(tmp_path_factory.mktemp("tokenizer"), config=config)


@given(st.text())
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == BOS and tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.tokenize(text), tokenizer.detokenize(ids)) == (ids, text)


def test_special_ids(tokenizer):
    assert tokenizer.vocab_size == 258
    assert (tokenizer.eos_ids, tokenizer.eod) == ((EOS,), EOS)
    assert tokenizer.bos_id == tokenizer.bos == BOS
    assert tokenizer.decode([EOS], skip_special_tokens=False) == "<eos>"


def test_generation_config_comes_first(tmp_path):
    generation = {"eos_token_id": [5, 6]}
    tokenizer = save(tmp_path, config={"eos_token_id": EOS}, generation_config=generation)
    assert (tokenizer.eos_ids, tokenizer.eod, tokenizer.bos_id) == ((5, 6), 5, None)


def test_no_end_token(tmp_path):
    tokenizer = save(tmp_path)
    assert tokenizer.eos_ids == ()
    with pytest.raises(ValueError, match="eos_token_id"):
        tokenizer.eod


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_broken_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.from_directory(tmp_path)
