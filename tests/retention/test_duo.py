"""Layers decide together which pages stay, by their retrieval heads; streaming layers keep none."""

import pytest
import torch
from calibrations import drawn_calibration
from layer_caches import HEADS, NUM_GROUPS, SCALE, SHAPE, WIDTH

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.calibrated import save_calibrated
from pikv_megatron.codec.calibration import moment_tensors
from pikv_megatron.codec.transform.moments import KVMoments, Moments
from pikv_megatron.retention.duo import DuoOptions
from pikv_megatron.types import PageStats

SIZES = dict(
    shard_after=0, page_size=4, window=8, num_sinks=2, flush_interval=3, retention="duo",
    budget={"name": "pages", "pages": 2},
)
STREAMS = torch.zeros(HEADS)


@pytest.fixture
def calibration(tmp_path):
    """Three layers, the second of which streams."""
    moments = moment_tensors(KVMoments(*(Moments.of(torch.randn(2, 9, WIDTH)) for _ in "kv")))
    layer = drawn_calibration() | moments
    layers = {
        number: {name: part.clone() for name, part in layer.items()} for number in range(3)
    }
    layers[1]["heads.far"] = STREAMS
    save_calibrated(tmp_path / "c.safetensors", {}, layers)
    return tmp_path / "c.safetensors"


def new_context(calibration, **fields) -> PiKVInferenceContext:
    config = PiKVConfig(**SIZES | fields, calibration=calibration)
    return PiKVInferenceContext(1, 200, config, config.resolve([SHAPE] * 3))


def worth(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[12], what the last 9 queries give the pages of tokens 2 to 49 in KV head 1, which
    retrieves."""
    logits = torch.einsum("qhw,kw->hqk", query[:, 2:], keys[:, 1]) * SCALE
    is_later = torch.ones(60, 60, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(is_later, -torch.inf).softmax(2)[:, -9:]
    return weights.sum((0, 1))[2:50].unflatten(0, (12, 4)).sum(1)


@pytest.mark.parametrize("selector", ["all", "budget"])
def test_layers_keep_what_they_want_most_together(calibration, selector):
    context = new_context(calibration, selector=selector)
    sequence = context.start(0)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(60, NUM_GROUPS, WIDTH, generator=generator)
    queries = torch.randn(3, 60, HEADS, WIDTH, generator=generator)
    context.begin_step([[StepRow(sequence, 60)]], torch.device("cpu"))
    for layer, query in zip(context.sharded_layers, queries):
        layer.attend(query, keys, keys, context.plan)
        layer.settle(context.plan, None)
    by_layer = [worth(keys, queries[number]) for number in (0, 2)]
    best = [set(each.topk(2).indices.tolist()) for each in (*by_layer, sum(by_layer))]
    assert best[0] != best[1], "they are to want different pages"
    kept = [
        {(first - 2) // 4 for first in
         layer.store.pool.position[layer.store.table.pages_of(0)][:, 0].tolist()}
        for layer in context.sharded_layers
    ]
    assert kept == [best[2], set(), best[2]]
    if selector == "budget":
        tables = (layer.directory.table for layer in context.sharded_layers)
        assert [int(table.count.sum()) for table in tables] == [2, 0, 2]
    context.check_integrity()


def test_a_streaming_layer_reserves_no_pages(calibration):
    context = new_context(calibration)
    stores = [layer.store for layer in context.sharded_layers]
    assert [store.keeper.num_columns(50) for store in stores] == [2, 0, 2]


def test_heads_that_stream_have_no_say():
    """KV head 1 retrieves: its second head does."""
    policy = DuoOptions().build(drawn_calibration())
    mass = torch.tensor([[[9.0, 0.1], [0.0, 0.8], [0.0, 0.0]]])
    stats = PageStats(
        torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None], torch.zeros(1, 3).long(),
        mass, torch.tensor([[2.0, 2.0, 0.0]]),
    )
    assert policy.utility(stats)[0].tolist() == pytest.approx([0.05, 0.4, float("inf")])


@pytest.mark.parametrize("fields, message", [
    ({"expert_shards": 2}, "with expert_shards 2 a page holds other tokens in each"),
    ({"budget": "pyramid"}, "give them one budget"),
    ({"budget": "bytes"}, "give them one budget"),
    ({"budget": {"name": "pages", "across_layers": 2}}, "give them one budget.*across_layers"),
    ({"codec": {"transform": {"name": "pyramidkv", "young": 1}}}, "pools pages of each by itself"),
])
def test_what_parts_the_layers_is_refused(calibration, fields, message):
    with pytest.raises(ValueError, match=f"retention duo .*{message}"):
        new_context(calibration, **fields)
