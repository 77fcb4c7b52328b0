"""What is dropped is freed: bytes by the allocator, behind a prompt of 8K tokens."""

import pytest
import torch
from layer_caches import SCALE

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.types import KVShape

LENGTH, WIDTH = 8192, 64
CHUNK = 256  # as in configs/retention: a chunk is held before its pages are judged
SHAPE = LayerShape(KVShape(2, WIDTH, WIDTH, torch.float32, torch.device("cpu")), 2, SCALE)


def held_bytes(**fields) -> int:
    config = PiKVConfig(page_size=16, window=32, prefill_chunk_size=CHUNK, **fields)
    context = PiKVInferenceContext(1, LENGTH, config, config.resolve([SHAPE]))
    sequence, layer = context.start(0), context.layers[1]
    context.reserve([(sequence, LENGTH)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(LENGTH // CHUNK):
        context.begin_step([[StepRow(sequence, CHUNK)]], torch.device("cpu"))
        query, key, value = torch.randn(3, CHUNK, 2, WIDTH, generator=generator)
        layer.attend(query, key, value, context.plan)
        layer.settle(context.plan, None)
        context.finish_step()
    return context.allocated_bytes()


def test_a_quarter_of_the_pages_takes_at_most_three_tenths_of_the_bytes():
    assert held_bytes(retention="streaming") <= 0.30 * held_bytes()
    assert held_bytes(retention="h2o") <= 0.30 * held_bytes()


@pytest.mark.parametrize("fields, most", [
    ({"retention": "streaming", "sketch": "mean_key"}, 12), ({"retention": "h2o"}, 12),
    # Each of those that grow old is new first.
    ({"codec": {"format": {"name": "aged", "young": 2, "new": "int8", "old": "int4"}}}, 20),
])
def test_a_short_sequence_reserves_what_it_can_fill(fields, most):
    """Much less than the chunk that a prompt is fed in; and no step has to grow it."""
    config = PiKVConfig(page_size=16, window=32, **fields)
    context = PiKVInferenceContext(1, LENGTH, config, config.resolve([SHAPE]))
    sequence, layer = context.start(0), context.layers[1]
    context.reserve([(sequence, 200)])
    reserved = layer.num_pages
    assert max(reserved) <= most
    context.begin_step([[StepRow(sequence, 200)]], torch.device("cpu"))
    query, key, value = torch.randn(3, 200, 2, WIDTH)
    layer.attend(query, key, value, context.plan)
    layer.settle(context.plan, None)
    context.finish_step()
    assert layer.num_pages == reserved
