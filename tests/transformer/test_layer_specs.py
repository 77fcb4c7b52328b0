"""The swapped spec: the same parameters, and the stock layer wherever there is no PiKV context."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from parity_models import VOCAB, build, cached_logits, config, plain_logits

from pikv_megatron import PiKVConfig, PiKVInferenceContext, pikv_layer_spec
from pikv_megatron.transformer.latent_attention import PiKVLatentAttention

PIKV = PiKVConfig(shard_after=0, page_size=4, window=3, num_sinks=1, flush_interval=2)

VARIANTS = {
    "gqa": {},
    "mha": {"num_query_groups": 4},
    "qk_layernorm": {"qk_layernorm": True},
    "shared_expert": {"moe_shared_expert_intermediate_size": 32},
    "sigmoid_router": {"moe_router_score_function": "sigmoid"},
    "interleaved_rope": {"rotary_interleaved": True},
    "no_rope_layer": {"no_rope_freq": [0, 1]},
    "partial_rope": {"gpt": {"rotary_percent": 0.5}},
    "scaled_rope": {"gpt": {"rope_scaling": True}},
    "learned_positions": {"gpt": {"position_embedding_type": "learned_absolute"}},
    "no_positions": {"gpt": {"position_embedding_type": "none"}},
    "tied_embeddings": {"gpt": {"share_embeddings_and_output_weights": True}},
}


def mixed_spec(pg):
    cfg = config(pg, moe_layer_freq=[0, 1])
    return get_gpt_decoder_block_spec(cfg, use_transformer_engine=False, normalization="RMSNorm")


def pair(pg, **changes):
    """A stock model and a swapped one with the same weights."""
    stock, swapped = build(pg, None, **changes), build(pg, PIKV, seed=1, **changes)
    swapped.load_state_dict(stock.state_dict(), strict=True)
    return stock, swapped


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_are_the_same_and_checkpoints_load(one_rank, name):
    stock, swapped = pair(one_rank, **VARIANTS[name])
    assert list(stock.state_dict()) == list(swapped.state_dict())
    assert list(stock.sharded_state_dict()) == list(swapped.sharded_state_dict())
    ours, theirs = (m.sharded_state_dict() for m in (swapped, stock))
    assert {k: getattr(v, "key", None) for k, v in ours.items()} == {
        k: getattr(v, "key", None) for k, v in theirs.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_through_the_cache_equal_the_stock_model(one_rank, name):
    stock, swapped = pair(one_rank, **VARIANTS[name])
    sequences = [[(7 * i + j) % VOCAB for i in range(30)] for j in range(3)]
    context = PiKVInferenceContext.for_model(swapped, PIKV, 3, 64)
    cached = cached_logits(swapped, context, sequences, [11, 1, 24], chunk=9)
    for index, sequence in enumerate(sequences):
        torch.testing.assert_close(cached[index], plain_logits(stock, sequence), atol=1e-4, rtol=0)


def test_dense_layers_among_moe_layers(one_rank):
    stock = build(one_rank, None, spec=mixed_spec(one_rank), moe_layer_freq=[0, 1])
    placed = PiKVConfig(page_size=2, window=2, expert_shards=4, replicas=2, flush_interval=1)
    spec = pikv_layer_spec(mixed_spec(one_rank), placed)
    swapped = build(one_rank, None, spec=spec, moe_layer_freq=[0, 1])
    context = PiKVInferenceContext.for_model(swapped, placed, 2, 64)
    sequences = [list(range(20)), list(range(40, 75))]
    cached = cached_logits(swapped, context, sequences, [12, 30], chunk=100)
    for index, sequence in enumerate(sequences):
        torch.testing.assert_close(cached[index], plain_logits(stock, sequence), atol=1e-4, rtol=0)


def test_training_equals_stock_bit_for_bit(one_rank):
    stock, swapped = pair(one_rank)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for model in (stock, swapped):
        model.train()
        loss = model(ids, torch.arange(12).expand(2, 12), None, labels=ids).sum()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for a, b in zip(stock.parameters(), swapped.parameters()):
        assert torch.equal(a.grad, b.grad)


@torch.no_grad()
def test_a_stock_context_equals_stock_bit_for_bit(one_rank):
    stock, swapped = pair(one_rank)
    contexts = StaticInferenceContext(2, 32), StaticInferenceContext(2, 32)
    for first, last in ((0, 9), (9, 10), (10, 11)):
        ids = torch.arange(first, last).expand(2, -1)
        out = [
            model(ids, ids, None, inference_context=context, runtime_gather_output=True)
            for model, context in zip((stock, swapped), contexts)
        ]
        assert torch.equal(*out)
        for context in contexts:
            context.increment_sequence_len_offset(last - first)


def test_the_given_spec_is_left_alone(one_rank):
    spec = get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm")
    before = spec.module, spec.submodules.self_attention.module
    pikv_layer_spec(spec, PIKV)
    assert (spec.module, spec.submodules.self_attention.module) == before


def test_unknown_attention_is_refused():
    spec = get_gpt_layer_local_spec(num_experts=8)
    spec.submodules.self_attention.module = torch.nn.Identity
    with pytest.raises(ValueError, match="Identity.*SelfAttention and MLASelfAttention"):
        pikv_layer_spec(spec, PIKV)


def test_latent_attention_is_swapped():
    spec = get_gpt_layer_local_spec(num_experts=8, multi_latent_attention=True)
    swapped = pikv_layer_spec(spec, PIKV)
    assert swapped.submodules.self_attention.module is PiKVLatentAttention


def test_something_else_than_a_layer_is_refused():
    with pytest.raises(ValueError, match="spec"):
        pikv_layer_spec(object(), PIKV)


@pytest.mark.parametrize(
    "changes, field", [({"window_size": (8, 1)}, "window_size"), ({"flash_decode": True}, "flash")]
)
def test_what_cannot_work_is_refused_at_construction(one_rank, changes, field):
    with pytest.raises(ValueError, match=field):
        build(one_rank, PIKV, **changes)


def test_more_replicas_than_chosen_experts_are_refused(one_rank):
    with pytest.raises(ValueError, match="moe_router_topk"):
        build(one_rank, PiKVConfig(expert_shards=4, replicas=3))
