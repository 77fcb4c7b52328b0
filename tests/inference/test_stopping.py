"""Stop tokens, stop strings and incremental text, against decoding the whole."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from pikv_megatron.checkpoint.tokenizer import Tokenizer
from pikv_megatron.inference.incremental_text import IncrementalDecoder
from pikv_megatron.inference.stopping import StopCriteria

texts = st.text(alphabet="ab €é漢👍\ufffd\n", max_size=40)


class Bytes:
    """A byte-level tokenizer: token = byte; also counts the tokens it was asked to decode."""

    def __init__(self):
        self.num_decoded = 0

    def decode(self, ids):
        self.num_decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")


class Pieces:
    """A tokenizer whose tokens are the given texts."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def byte_level_backend():
    """The Hugging Face byte-level tokenizer without merges: 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback_backend():
    """As Llama's and Mixtral's: a few words, bytes for the rest, a space stripped at the start."""
    words = ["▁", "a", "b", "▁a", "▁ab"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    return backend


def pieces_of(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(token) for token in ids] + [decoder.pending]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120))
def test_pieces_of_any_bytes_add_up_to_the_whole(data):
    assert "".join(pieces_of(Bytes(), data)) == data.decode("utf-8", errors="replace")


@settings(max_examples=80, deadline=None)
@given(texts)
@pytest.mark.parametrize("make", [byte_level_backend, byte_fallback_backend])
def test_pieces_of_real_tokenizers_add_up_to_the_whole(make, text):
    backend = make()
    if make is byte_fallback_backend:  # where a literal U+FFFD looks like a broken byte
        text = text.replace("\ufffd", "")
    ids = backend.encode(text).ids
    pieces = pieces_of(backend, ids)
    assert "".join(pieces) == backend.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(texts, texts, st.integers(0, 3))
@pytest.mark.parametrize("make", [byte_level_backend, byte_fallback_backend])
def test_new_text_is_the_whole_without_the_prompts(make, before, after, shift):
    """The prompt may end within a character."""
    backend = make()
    before, after = (text.replace("\ufffd", "") for text in (before, after))
    whole = backend.encode(before + after).ids
    cut = max(0, len(backend.encode(before).ids) - shift)
    decoder = IncrementalDecoder(backend, whole[:cut])
    pieces = [decoder.push(token) for token in whole[cut:]] + [decoder.pending]
    text = backend.decode(whole)
    starts = (backend.decode(whole[: cut - n]) for n in range(cut + 1))
    prompt = next(start for start in starts if not start.endswith("\ufffd"))
    assert text.startswith(prompt) and "".join(pieces) == text[len(prompt) :]


def test_a_prompts_own_broken_bytes_are_not_new():
    for data in (b"a\xff", b"a\xff\xff\xff\xff\xff"):
        decoder = IncrementalDecoder(Bytes(), data)
        assert decoder.pending == ""
        assert decoder.push(ord("b")) + decoder.pending == "b"
        assert decoder.push(0xFF) + decoder.pending == "\ufffd"


def test_the_first_new_word_keeps_its_space():
    backend = byte_fallback_backend()
    prompt, new = backend.encode("ab").ids, backend.encode("a ab").ids[1:]
    assert backend.decode(new) == "ab" and backend.decode(prompt + new) == "ab ab"
    criteria = StopCriteria(stop_strings=[" a"], tokenizer=backend)
    criteria.reset([prompt, [*backend.encode("b").ids, *prompt * 40]])
    for index in (0, 1):
        assert criteria.update(index, new[0]) == "stop" and criteria.text(index) == ""
    criteria = StopCriteria(tokenizer=backend)
    criteria.reset([prompt])
    assert criteria.update(0, new[0]) is None and criteria.text(0) == " ab"


def test_a_prompt_that_ends_with_special_tokens_is_still_behind_its_text():
    backend = byte_fallback_backend()
    backend.add_special_tokens(["<s>"])
    special, new = backend.token_to_id("<s>"), backend.encode("a ab").ids[1]
    decoder = IncrementalDecoder(Tokenizer(backend), [*backend.encode("ab").ids, *[special] * 50])
    assert decoder.push(new) == " ab"


def special_tokenizer():
    backend = byte_level_backend()
    backend.add_special_tokens(["<|end|>", "<|sep|>"])
    return Tokenizer(backend)


@pytest.mark.parametrize("stop", ["<|end|>", "b<|end|>", "<|sep|><|end|>c", "c"])
def test_a_stop_string_may_hold_special_tokens(stop):
    tokenizer, text = special_tokenizer(), "ab<|sep|><|end|>c<|end|>"
    text = text.replace("b<|sep|>", "<|sep|>b") if stop.startswith("b") else text
    criteria = StopCriteria(stop_strings=[stop], tokenizer=tokenizer)
    seen, streamed = [], ""
    for token in tokenizer.encode(text):
        seen.append(token)
        reason = criteria.update(0, token)
        streamed += criteria.take_text(0)
        if reason:
            break
    shown = tokenizer.decode(seen, skip_special_tokens=False)
    assert reason == "stop" and shown.endswith(stop) and shown.count(stop) == 1
    without = shown.removesuffix(stop).replace("<|sep|>", "").replace("<|end|>", "")
    assert criteria.text(0) == streamed == without


def test_a_long_run_of_fallback_bytes_stays_readable():
    backend = byte_fallback_backend()
    ids = backend.encode("漢" * 100).ids
    assert len(ids) > 300
    assert "".join(pieces_of(backend, ids)) == "漢" * 100


def test_characters_appear_with_their_last_byte():
    assert pieces_of(Bytes(), "a€👍".encode()) == ["a", "", "", "€", "", "", "", "👍", ""]


@pytest.mark.parametrize("data", [b"a" * 4000, b"\xff" * 4000, "漢".encode() * 1333])
def test_decoding_is_linear(data):
    tokenizer = Bytes()
    pieces_of(tokenizer, data)
    assert tokenizer.num_decoded < 40 * len(data)


def plain_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that ends first, the longest if several do; None if none."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), min_size=1, max_size=20),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut_into_tokens(pieces, stops):
    criteria = StopCriteria(stop_strings=stops, tokenizer=Pieces(*pieces))
    streamed, finished_at = "", None
    for token in range(len(pieces)):
        reason = criteria.update(0, token)
        streamed += criteria.take_text(0)
        if reason:
            finished_at = token
            break
    expected = plain_stop("".join(pieces), stops)
    assert (finished_at is None) == (expected is None)
    if expected is None:
        assert criteria.text(0) == "".join(pieces)
        assert criteria.text(0).startswith(streamed)
    else:
        assert criteria.text(0) == streamed == expected
        assert plain_stop("".join(pieces[:finished_at]), stops) is None


def test_streaming_gives_text_as_soon_as_it_is_certain():
    criteria = StopCriteria(stop_strings=["END"], tokenizer=Bytes())
    streamed = []
    for byte in b"aENbEND":
        criteria.update(0, byte)
        streamed.append(criteria.take_text(0))
    assert streamed == ["a", "", "", "ENb", "", "", ""]


def test_a_stop_string_may_hold_multi_byte_characters():
    criteria = StopCriteria(stop_strings=["。"], tokenizer=Bytes())
    reasons = [criteria.update(0, byte) for byte in "漢。".encode()]
    assert reasons == [None] * 5 + ["stop"] and criteria.text(0) == "漢"


def test_stop_tokens_end_their_own_sequence_only():
    criteria = StopCriteria(stop_token_ids=[7], tokenizer=Bytes())
    assert criteria.update(0, 65) is None and criteria.update(3, 66) is None
    assert criteria.update(0, 7) == "stop" and criteria.update(3, 67) is None
    assert criteria.update(0, 68) == "stop"
    assert criteria.text(0) == "A" and criteria.text(3) == "BC"


def test_text_ends_with_its_unfinished_character():
    criteria = StopCriteria(stop_token_ids=[7], tokenizer=Bytes())
    for byte in (65, 0xE2, 0x82):
        criteria.update(0, byte)
    assert criteria.text(0) == "A\ufffd"
    criteria.update(0, 7)
    assert criteria.text(0) == "A\ufffd"


def test_reset_forgets():
    criteria = StopCriteria(stop_strings=["ab"], tokenizer=Bytes())
    criteria.update(0, 97)
    criteria.reset()
    assert criteria.update(0, 98) is None and criteria.text(0) == "b"


def test_stop_tokens_need_no_tokenizer():
    criteria = StopCriteria(stop_token_ids=[7])
    assert criteria.update(0, 1) is None and criteria.update(0, 7) == "stop"
    with pytest.raises(ValueError, match="tokenizer"):
        criteria.text(0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"stop_strings": ["a"]}, "tokenizer"),
        ({"stop_strings": [""], "tokenizer": Bytes()}, "empty"),
        ({"stop_strings": "END", "tokenizer": Bytes()}, "list"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_refuses_wrong_criteria(wrong, message):
    with pytest.raises(ValueError, match=message):
        StopCriteria(**wrong)
