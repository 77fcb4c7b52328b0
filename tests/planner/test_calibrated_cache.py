"""A plan knows what a calibration says: which layers keep nothing, and what is kept of a page."""

import pytest
import torch
from test_packaging import ROOT

from pikv_megatron import PiKVConfig, pikv_layer_spec
from pikv_megatron.checkpoint.huggingface import load_huggingface
from pikv_megatron.checkpoint.huggingface_config import read_architecture
from pikv_megatron.inference.engine import Engine
from pikv_megatron.inference.request import Request
from pikv_megatron.planner.planned_cache import PlannedCache
from pikv_megatron.planner.target import Target

MODEL, BATCH, CONTEXT, NEW = ROOT / "models/demo", 2, 1024, 24


@pytest.fixture(scope="module")
def model(one_rank):
    return load_huggingface(
        MODEL, one_rank, torch.float32, lambda spec: pikv_layer_spec(spec, PiKVConfig())
    ).eval()


@pytest.mark.parametrize("name", ["expected_attention", "quest", "duo"])
def test_a_calibrated_cache_takes_what_is_planned(model, one_rank, name):
    pikv = PiKVConfig.from_file(ROOT / f"configs/retention/{name}.yaml")
    architecture = read_architecture(MODEL)
    engine = Engine(
        model, pikv, one_rank.ep, architecture.vocab_size, architecture.max_sequence_length, BATCH
    )
    prompt = [7 * i % 250 for i in range(CONTEXT - NEW)]
    engine.add([Request(prompt, NEW) for _ in range(BATCH)])
    planned = PlannedCache(Target(architecture, pikv, 1, BATCH, CONTEXT, NEW, torch.float32))
    by_layer = (layer.count * sum(layer.bytes_by_part.values()) for layer in planned.layers)
    assert engine.context.allocated_bytes() == sum(by_layer)
    pages = [layer.num_pages[0] for layer in engine.context.sharded_layers]
    assert pages[0] == pages[2] and (name != "duo" or pages[1] < pages[0] / 2)
