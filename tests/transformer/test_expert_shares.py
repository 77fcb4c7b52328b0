"""Routers that listen to experts hear those that the layers have."""

from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from parity_models import VOCAB, build, draw_weights

from pikv_megatron import PiKVConfig, PiKVForCausalLM, PiKVInferenceContext
from pikv_megatron.calibrated import load_calibrated, save_calibrated
from pikv_megatron.calibration.run import calibrate
from pikv_megatron.router.linear_gate import LEAST

FIELDS = dict(
    page_size=4, window=6, num_sinks=2, flush_interval=3, shard_after=0, token_shards=2,
    expert_shards=4,
)


@pytest.fixture(params=[True, False], ids=["lean", "stock"])
def is_lean(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def calibration(one_rank, tmp_path_factory) -> Path:
    """Of the model whose weights are drawn with seed 0."""
    path = tmp_path_factory.mktemp("gate") / "calibration.safetensors"
    model = build(one_rank, PiKVConfig())
    draw_weights(model, 0)
    ids = torch.randint(VOCAB, (2, 120), generator=torch.Generator().manual_seed(2))
    save_calibrated(path, {"model": "tiny"}, calibrate(model, ids, VOCAB, {}))
    return path


def heard(
    pg, source: str, is_lean: bool, calibration: Path
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of every decode step: the layer, what its router was told, and what is right."""
    config = PiKVConfig(
        **FIELDS, router={"name": "top_k", "k": 1, "source": source}, lean_experts=is_lean,
        calibration=calibration,
    )
    fitted = load_calibrated(calibration).layers
    model = build(pg, config)
    draw_weights(model, 0)
    lm = PiKVForCausalLM(model, config, vocab_size=VOCAB)
    prompts = [[(7 * i) % VOCAB for i in range(30)], list(range(25))]
    lm.generate(prompts, max_new_tokens=2, keep_cache=True)
    found, inputs, chosen = [], {}, {}
    for number, layer in enumerate(model.decoder.layers):
        layer.self_attention.register_forward_pre_hook(
            lambda module, args, number=number: inputs.update({number: args[0]})
        )
        layer.mlp.router.register_forward_hook(
            lambda module, args, out, number=number: chosen.update({number: out[0]})
        )

    def told(number, visit):
        def spy(ask):
            shards = visit(ask)
            weight = model.decoder.layers[number].mlp.router.weight
            right = (inputs[number][: len(ask.query), 0] @ weight.T).softmax(1)
            if source == "previous" and number:
                right = chosen[number - 1][: len(ask.query)]
            if source == "gate":
                gate = fitted[number]
                right = inputs[number][: len(ask.query), 0] @ gate["gate.weight"]
                right = (right + gate["gate.bias"]).clamp(min=LEAST)
                right = right / right.sum(1, keepdim=True)
            # Two token shards: an expert's tokens lie in two of four shards.
            by_class = right.unflatten(1, (2, 4)).sum(1)
            halves = (by_class[:, [0, 1, 2, 3]] + by_class[:, [1, 0, 3, 2]]) / 2
            found.append((number, ask.shard_scores(), halves))
            return shards

        return spy

    for number, layer in enumerate(lm.engine.context.layers.values()):
        assert layer.directory is None  # nobody asks for pages
        layer.router.visit = told(number, layer.router.visit)
    lm.generate([[1], [2]], max_new_tokens=4, resume=True)
    return found


def test_a_layer_without_experts_is_refused(one_rank):
    config = PiKVConfig(**FIELDS, router={"name": "top_k", "source": "moe"})
    dense = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = build(one_rank, config, spec=dense)
    with pytest.raises(ValueError, match="layer 0 has no experts"):
        PiKVInferenceContext.for_model(model, config, 1, 64)


@pytest.mark.parametrize("source", ["moe", "previous", "gate"])
def test_shards_are_worth_what_experts_say(one_rank, source, is_lean, calibration):
    found = heard(one_rank, source, is_lean, calibration)
    assert {number for number, *_ in found} == {0, 1}
    for _, told, right in found:
        torch.testing.assert_close(told, right, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(told.sum(1), torch.ones(len(told)))
