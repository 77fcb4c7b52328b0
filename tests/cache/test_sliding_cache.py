"""A sliding window's cache: as long as the window, whatever the sequence; nothing of others."""

import pytest
import torch
from layer_caches import HEADS, NUM_GROUPS, SCALE, SHAPE, WIDTH

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.ops.window_attention import window_attention

WINDOW = 7
SLIDING = SHAPE._replace(sliding_window=WINDOW)


def new_context(max_sequence_length: int) -> PiKVInferenceContext:
    config = PiKVConfig(page_size=4, window=3, num_sinks=1, flush_interval=2)
    return PiKVInferenceContext(2, max_sequence_length, config, config.resolve([SLIDING, SHAPE]))


def fed(context, sequences, counts, generator) -> list[tuple[torch.Tensor, ...]]:
    """Feed random tokens to sequences; the query, key, value and output of each."""
    rows = [StepRow(sequence, count) for sequence, count in zip(sequences, counts)]
    context.begin_step([rows], torch.device("cpu"))
    plan = context.plan
    shapes = ((HEADS, WIDTH), (NUM_GROUPS, WIDTH), (NUM_GROUPS, WIDTH))
    tokens = [torch.randn(plan.num_tokens, *shape, generator=generator) for shape in shapes]
    output = context.layers[1].attend(*tokens, plan)
    context.layers[1].settle(plan, None)
    context.finish_step()
    order = [row.sequence for row in plan.rows]
    parts = zip(*(x.split([row.count for row in plan.rows]) for x in (*tokens, output)))
    by_slot = {sequence.slot: part for sequence, part in zip(order, parts)}
    return [by_slot[sequence.slot] for sequence in sequences]


@pytest.mark.parametrize("chunks", [(1, 1, 1), (5, 1, 9), (20, 2, 1), (3, 30, 1)])
def test_each_token_sees_the_last_ones_of_its_own_sequence(chunks):
    generator = torch.Generator().manual_seed(sum(chunks))
    context = new_context(128)
    for _ in range(2):  # the second time in slots that others have left
        context.layers[1].keys[:] = context.layers[1].values[:] = torch.nan
        sequences = [context.start(0) for _ in range(2)]
        steps = [fed(context, sequences, (count, 4), generator) for count in chunks]
        steps += [fed(context, sequences, (1, 1), generator) for _ in range(2 * WINDOW)]
        for index, sequence in enumerate(sequences):
            query, key, value, found = (torch.cat(x) for x in zip(*(step[index] for step in steps)))
            expected = window_attention(query, key, value, WINDOW, SCALE).out
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            context.release(sequence)


def test_memory_is_that_of_the_window():
    token_bytes = SHAPE.kv.token_bytes
    for longest in (128, 4096):
        sliding = new_context(longest).layers[1].parts()["windows"]
        assert sum(tensor.nbytes for tensor in sliding) == 2 * WINDOW * token_bytes
