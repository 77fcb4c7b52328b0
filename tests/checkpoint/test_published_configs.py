"""Released models are described, built and planned without their weights."""

import math
from unittest import mock

import pytest
import torch
from published_configs import PUBLISHED

from pikv_megatron import PiKVConfig, pikv_layer_spec
from pikv_megatron.checkpoint.families.registry import FAMILIES
from pikv_megatron.checkpoint.huggingface_config import architecture_of
from pikv_megatron.checkpoint.model_builder import build_model
from pikv_megatron.checkpoint.name_table import Slot, name_table, named_tensors
from pikv_megatron.transformer.layer_shapes import layer_shapes

MOST_LAYERS = 4  # that are built; they repeat themselves


def test_every_family_has_a_released_model():
    families = {architecture_of(config).family for config, _ in PUBLISHED.values()}
    assert families == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_names_are_those_of_all_its_parameters(name):
    config, billions = PUBLISHED[name]
    slots = name_table(architecture_of(config)).values()
    count = sum(math.prod(source.shape) for slot in slots for source in slot.sources)
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def packed_shape(slot: Slot) -> tuple[int, ...]:
    return (sum(source.shape[0] for source in slot.sources), *slot.sources[0].shape[1:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_built_and_planned_without_weights(name, one_rank):
    config, _ = PUBLISHED[name]
    architecture = architecture_of(config)
    layers = min(MOST_LAYERS, architecture.num_layers)
    cut = {
        field: tuple(layer for layer in getattr(architecture, field) if layer < layers)
        for field in ("dense_layers", "sliding_layers")
    }
    cut = architecture.model_copy(update={"num_layers": layers, **cut})
    pikv = PiKVConfig()
    meta = torch.device("meta")
    with meta, mock.patch.object(torch.cuda, "current_device", lambda: meta):
        model = build_model(
            cut, one_rank, torch.bfloat16, lambda spec: pikv_layer_spec(spec, pikv),
            {"perform_initialization": False},
        )
    built = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    assert built == {name: packed_shape(slot) for name, slot in name_table(cut).items()}
    specs = pikv.resolve(layer_shapes(model))
    for layer, spec in enumerate(specs):
        if "kv_lora_rank" in config:  # 576 numbers, in bfloat16
            assert spec.kv.num_groups == 1 and spec.kv.token_bytes == 2 * 576
            heads = config["qk_nope_head_dim"] + 64, config["v_head_dim"]
            assert spec.sent_widths == heads
        else:
            assert spec.kv.num_groups == config["num_key_value_heads"]
            assert spec.kv.token_bytes == 2 * 2 * spec.kv.num_groups * architecture.head_dim
        is_sliding = layer in architecture.sliding_layers
        assert spec.sliding_window == (architecture.sliding_window if is_sliding else None)
