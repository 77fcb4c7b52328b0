"""Tokenizers of Hugging Face directories, and Megatron-Core's names for the same."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

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


def test_a_prompt_is_never_cut_or_padded(tmp_path):
    backend = save(tmp_path).backend
    backend.enable_truncation(16)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a" * 43
    reference = AutoTokenizer.from_pretrained(tmp_path, tokenizer_class="TokenizersBackend")
    ids = Tokenizer.from_directory(tmp_path).encode(text)
    assert ids == reference(text)["input_ids"] and len(ids) == 44


LISTED = {
    "added_tokens": {"<|x|>": 258},
    "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            "258": {"content": "<|x|>", "special": True, "normalized": False, "lstrip": False,
                    "rstrip": False, "single_word": False},
        },
    },
}


@pytest.mark.parametrize("name", LISTED)
def test_special_tokens_that_stand_beside_the_tokenizer_only(tmp_path, name):
    tokenizer = save(tmp_path, **{name: LISTED[name]})
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("a<|x|>b")
    assert ids == reference("a<|x|>b")["input_ids"] and ids.count(258) == 1
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert (258 in tokenizer.special_tokens) == (name == "tokenizer_config")


def test_a_listed_token_that_cannot_have_its_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="added_tokens.json.*'<|x|>' is listed as 300"):
        save(tmp_path, added_tokens={"<|x|>": 300})


@pytest.mark.parametrize("value", ["</s>", -1, [1, None], 2.5, True])
def test_wrong_end_tokens_are_named(tmp_path, value):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
        save(tmp_path, generation_config={"eos_token_id": value})


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        tokenizer.encode("a\udcff")
