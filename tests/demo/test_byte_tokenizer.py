"""Every text comes back from the byte tokenizer, and token i is byte i."""

from hypothesis import given
from hypothesis import strategies as st

from pikv_megatron.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    NUM_BYTES,
    PAD_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    byte_tokenizer,
)

TOKENIZER = byte_tokenizer()


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_text_is_its_bytes_and_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_a_token():
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    for byte in range(0x80):
        assert TOKENIZER.encode(chr(byte)).ids == [byte]
    assert len({TOKENIZER.id_to_token(byte) for byte in range(NUM_BYTES)}) == NUM_BYTES


def test_special_tokens_follow_the_bytes():
    ids = [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == [BOS_ID, EOS_ID, PAD_ID] == [256, 257, 258]
    assert TOKENIZER.encode("a<eos>").ids == [ord("a"), EOS_ID]
    assert TOKENIZER.decode([ord("a"), EOS_ID]) == "a"
