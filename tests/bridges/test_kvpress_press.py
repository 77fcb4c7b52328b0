"""Retention and codecs as a press, in kvpress's own pipeline."""

import pytest
import torch
from tiny_directory import byte_tokenizer, save_tiny_mixtral
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from pikv_megatron import PiKVConfig

pytest.importorskip("kvpress", reason="the extra `kvpress` is not installed")

from kvpress import KnormPress  # noqa: E402

from pikv_megatron.bridges.kvpress import PiKVPress, cache_positions  # noqa: E402

SIZES = dict(page_size=8, window=16, num_sinks=4, flush_interval=4, prefill_chunk_size=16)
CONTEXT = "the quick brown fox jumps over the lazy dog; " * 5
HALF = {"retention": "h2o", "budget": {"name": "share", "keep": 0.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_mixtral(directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def answer(model):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<|end|>", eos_token="<|end|>"
    )
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def ask(press):
        with cache_positions(model):
            return pipe(CONTEXT, question="fox?", press=press, max_new_tokens=8)["answer"]

    return ask


@torch.no_grad()
def compressed(model, press) -> DynamicCache:
    cache = DynamicCache()
    with cache_positions(model), press(model):
        model(torch.tensor([list(CONTEXT.encode())] * 2), past_key_values=cache)
    return cache


def test_a_lossless_cache_changes_no_answer(answer):
    press = PiKVPress(PiKVConfig(**SIZES))
    assert answer(press) == answer(None)
    assert press.held_bytes > press.dense_bytes > 0  # whole pages, windows and metadata


def test_kvpress_own_presses_run_beside_it(model):
    assert compressed(model, KnormPress(0.5)).get_seq_length() == len(CONTEXT) // 2


def test_retention_leaves_fewer_tokens(answer, model):
    press = PiKVPress(PiKVConfig(**SIZES, **HALF))
    assert isinstance(answer(press), str)
    kept = compressed(model, press).get_seq_length()
    in_shards = len(CONTEXT) - 4 - 16
    assert in_shards // 2 <= kept - 20 <= in_shards // 2 + 16
    whole = PiKVPress(PiKVConfig(**SIZES))
    compressed(model, whole)
    assert press.held_bytes < 0.8 * whole.held_bytes and press.dense_bytes == whole.dense_bytes


@torch.no_grad()
def test_layers_that_keep_unlike_numbers_are_fed_several_tokens(model):
    """As one by one, which needs no mask."""
    press = PiKVPress(PiKVConfig(**SIZES, layers=[{"match": "0", **HALF}]))
    tokens = torch.tensor([list(b"fox?")] * 2)
    together, singly = compressed(model, press), compressed(model, press)
    assert together.get_seq_length(0) < together.get_seq_length(1) == len(CONTEXT)
    places = torch.arange(len(CONTEXT), len(CONTEXT) + 4).expand(2, -1)
    with cache_positions(model):
        found = model(tokens, past_key_values=together, position_ids=places).logits
        wanted = [
            model(tokens[:, i : i + 1], past_key_values=singly, position_ids=places[:, i : i + 1])
            for i in range(4)
        ]
    torch.testing.assert_close(found, torch.cat([x.logits for x in wanted], 1), atol=1e-4, rtol=0)


def test_a_codec_leaves_what_its_pages_stand_for(model):
    plain, packed = (
        compressed(model, PiKVPress(PiKVConfig(**SIZES, codec=codec)))
        for codec in ("none", {"format": "int8"})
    )
    for exact, stored in zip(plain.layers, packed.layers):
        for x, y in ((exact.keys, stored.keys), (exact.values, stored.values)):
            assert x.shape == y.shape
            error = (x - y).norm(dim=3) / x.norm(dim=3)
            assert 0 < float(error.max()) < 0.02
            for near in (slice(0, 4), slice(-16, None)):  # stay as computed
                assert torch.equal(x[:, :, near], y[:, :, near])


@pytest.mark.parametrize("fields, message", [
    ({"selector": "mass"}, "selector mass chooses what a decoded token reads"),
    ({"router": "top_k"}, "router top_k chooses what a decoded token reads"),
    ({"codec": {"transform": "pyramidkv"}}, "pyramidkv stores several tokens as one"),
    ({"retention": "kvpress"}, "retention kvpress: use the press itself"),
    ({"layers": [{"match": 1, "selector": "mass"}]}, "selector mass"),
])
def test_what_cannot_act_in_a_press_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PiKVPress(PiKVConfig(**SIZES, **fields))
