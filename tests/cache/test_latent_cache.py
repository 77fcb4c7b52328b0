"""A cache of latent rows gives what attention over expanded keys and values gives."""

import pytest
import torch
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.head_maps import LatentMaps
from pikv_megatron.cache.step.step_rows import StepRow
from pikv_megatron.layer_spec import LayerShape
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.runtime.process_groups import process_groups
from pikv_megatron.types import AttentionState, KVShape

HEADS, OWN, ROTATED, SCALE = 6, 5, 4, 0.4
# Ranks of the latent and widths of a head's value: queries and results are narrower before or
# after they are absorbed.
WIDTHS = [(16, 7), (3, 7), (16, 20)]
CACHE = dict(page_size=4, window=6, num_sinks=1, flush_interval=3, shard_after=8)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_case(groups, rank: int, value_width: int, changes: dict) -> None:
    num_ranks = groups.ep.size()
    kv = KVShape(1, rank + ROTATED, rank, torch.float32, torch.device("cpu"), True)
    config = PiKVConfig(**CACHE, **changes)
    context = PiKVInferenceContext(
        2, 80, config, config.resolve([LayerShape(kv, HEADS, SCALE)]),
        groups.ep if num_ranks > 1 else None,
    )
    maps = LatentMaps(draw(HEADS, OWN, rank), draw(HEADS, rank, value_width))
    live = [context.start(home % num_ranks) for home in range(2)]
    lengths = [49, 40]
    queries = [draw(length, HEADS, OWN + ROTATED) for length in lengths]
    rows = [draw(length, 1, rank + ROTATED) for length in lengths]
    found: dict[int, list] = {0: [], 1: []}
    while any(s.length < n for s, n in zip(live, lengths)):
        counts = [
            min(13 if s.length < 36 else 1, n - s.length) for s, n in zip(live, lengths)
        ]
        steps = [
            [StepRow(live[i], counts[i]) for i in (0, 1)
             if i % num_ranks == home and counts[i]]
            for home in range(num_ranks)
        ]
        context.begin_step(steps, torch.device("cpu"))
        plan, layer = context.plan, context.layers[1]
        spans = [
            (live.index(r.sequence), slice(r.past, r.end)) for r in plan.rows
        ]
        query, row = (
            torch.cat([x[0][:0], *(x[i][span] for i, span in spans)])
            for x in (queries, rows)
        )
        out = layer.attend(query, row, None, plan, maps=maps)
        layer.settle(plan, None)
        context.finish_step()
        context.check_integrity()
        for (i, span), part in zip(spans, out.split([s.stop - s.start for _, s in spans])):
            found[i].append(part)
    for i, parts in found.items():
        if parts:
            keys, values = (x.transpose(0, 1)[:, None] for x in maps.expand(rows[i], None))
            mask = torch.ones(1, lengths[i], lengths[i], dtype=torch.bool).tril()
            right = dense_attention(queries[i][None], keys, values, mask, SCALE).out[0]
            torch.testing.assert_close(torch.cat(parts), right, rtol=1e-4, atol=1e-5)
    _check_stored_once(context, kv)


def _check_stored_once(context: PiKVInferenceContext, kv: KVShape) -> None:
    layer = context.layers[1]
    assert layer.window.values is None and layer.store.pool.kv.values is None
    assert "values" not in layer.store.buffers.tensors
    assert kv.token_bytes == 4 * kv.key_width


OWNERS = {"sketch": "keys", "selector": {"name": "budget", "share": 1.0}}
GATHERED = {"dispatcher": "allgather", "selector": {"name": "budget", "share": 1.0}}
CASES = [(*widths, methods) for widths in WIDTHS for methods in ({}, OWNERS)]
CASES += [(*WIDTHS[0], GATHERED)]


def run_cases(num_ranks: int) -> None:
    with process_groups(expert_parallel_size=num_ranks) as groups:
        for case in CASES:
            run_case(groups, *case)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_are_cached_once_and_read_by_all_heads(num_ranks):
    run_ranks(run_cases, num_ranks, num_ranks, timeout=240)


def test_a_token_of_deepseek_v3_takes_576_numbers():
    """Besides the window, a token buffer, what takes lost writes, and what is noted of pages."""
    kv = KVShape(1, 576, 512, torch.bfloat16, torch.device("cpu"), values_in_keys=True)
    config, length = PiKVConfig(), 16384
    context = PiKVInferenceContext(
        1, length, config, config.resolve([LayerShape(kv, 128, 192**-0.5)])
    )
    empty, row = context.allocated_bytes(), kv.token_bytes
    rows = context.layout.size + 3 * config.page_size  # two buffers, the null page
    assert row == 2 * 576 and rows * row <= empty < 1.01 * rows * row
    context.reserve([(context.start(0), length)])
    pages = -(-(length - config.num_sinks - config.window) // config.page_size)
    grown = context.allocated_bytes() - empty
    assert pages * config.page_size * row <= grown < 1.01 * (pages * config.page_size) * row


@pytest.mark.parametrize("rank, value_width", WIDTHS)
def test_queries_and_results_travel_where_they_are_narrower(rank, value_width):
    maps = LatentMaps(draw(HEADS, OWN, rank), draw(HEADS, rank, value_width))
    query = draw(2, 1, HEADS, OWN + ROTATED)
    sent = maps.sent(query)
    assert sent.shape[-1] == min(OWN, rank) + ROTATED
    torch.testing.assert_close(maps.arrived(sent), maps.absorb(query))
    state = AttentionState(draw(2, 1, HEADS, rank), draw(2, 1, HEADS))
    returned = maps.returned(state)
    assert returned.out.shape[-1] == min(value_width, rank)
    torch.testing.assert_close(maps.merged(returned).out, maps.emit(state).out)
