"""Layers have their budgets together: pages stay where they have most of the attention."""

import pytest
import torch
from layer_caches import HEADS, NUM_GROUPS, SCALE, SHAPE, WIDTH

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.step.step_rows import StepRow

SIZES = dict(
    shard_after=0, page_size=4, window=8, num_sinks=4, flush_interval=3, retention="h2o",
    token_shards=2,
)
BUDGET = {"name": "pages", "pages": 2, "across_layers": 1.5}
LENGTH, PAGES = 92, 20


def new_context(**fields) -> PiKVInferenceContext:
    config = PiKVConfig(**SIZES | {"budget": BUDGET} | fields)
    return PiKVInferenceContext(1, 200, config, config.resolve([SHAPE] * 3))


def worth(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[20], what the last 9 queries give the pages of tokens 4 to 83, summed over heads."""
    logits = torch.einsum("qghw,kgw->ghqk", query.unflatten(1, (NUM_GROUPS, -1)), keys) * SCALE
    is_later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(is_later, -torch.inf).softmax(3)[:, :, -9:]
    return weights.sum((0, 1, 2))[4:84].unflatten(0, (PAGES, 4)).sum(1)


def kept_pages(layer) -> set[int]:
    first = layer.store.pool.position[layer.store.table.pages_of(0)][:, 0]
    return {position // 4 - 1 for position in first.tolist()}


@pytest.mark.parametrize("fields", [{}, {"selector": "budget"}, {"pinned": 8}])
def test_pages_move_to_the_layers_that_look_at_them(fields):
    """Of two shards with 3 x 2 pages each, a layer has at most three in either."""
    context = new_context(**fields)
    sequence = context.start(0)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(LENGTH, NUM_GROUPS, WIDTH, generator=generator)
    queries = torch.randn(3, LENGTH, HEADS, WIDTH, generator=generator)
    keys[:2] *= 4
    queries[1] += 3 * keys[:2].mean(0).repeat_interleave(2, 0)  # it looks at the first tokens
    context.begin_step([[StepRow(sequence, LENGTH)]], torch.device("cpu"))
    for layer, query in zip(context.sharded_layers, queries):
        layer.attend(query, keys, keys, context.plan)
        layer.settle(context.plan, None)
    by_layer = torch.stack([worth(keys, query) for query in queries])
    right: list[set[int]] = [set(), set(), set()]
    for shard in range(2):
        mine = list(range(shard, PAGES, 2))
        pinned = [page for page in mine if "pinned" in fields and page == 0]
        for own in right:
            own.update(pinned)
        others = [page for page in mine if page not in pinned]
        limit = 2 - len(pinned)
        able = [
            (float(own[page]), number, page) for number, own in enumerate(by_layer)
            for page in sorted(others, key=lambda page: -own[page])[: int(limit * 1.5)]
        ]
        for _, number, page in sorted(able, reverse=True)[: 3 * limit]:
            right[number].add(page)
    kept = [kept_pages(layer) for layer in context.sharded_layers]
    assert kept == right and len({len(pages) for pages in kept}) > 1
    assert sum(map(len, kept)) == 12 and max(map(len, kept)) <= 6
    if "selector" in fields:
        tables = (layer.directory.table for layer in context.sharded_layers)
        assert [int(table.count.sum()) for table in tables] == [len(pages) for pages in right]
    context.check_integrity()


def reserved(**fields) -> PiKVInferenceContext:
    context = new_context(**fields)
    context.reserve([(context.start(0), 190)])
    return context


def test_layers_that_decide_together_have_room_for_what_they_keep_together():
    """A layer may list half as many pages more, and one pool has no more than even budgets have."""
    context, even = reserved(), reserved(budget=BUDGET | {"across_layers": 1})
    stores = [layer.store for layer in context.sharded_layers]
    assert [store.keeper.num_columns(50) for store in stores] == [6, 6, 6]
    assert [store.keeper.num_columns(5) for store in stores] == [5, 5, 5]
    assert len({id(store.pool) for store in stores}) == 1
    pools = [layer.store.pool for layer in even.sharded_layers]
    assert stores[0].pool.null_page == sum(pool.null_page for pool in pools)
    more = even.bytes_by_part()["pages"] - context.bytes_by_part()["pages"]
    assert more == 2 * sum(t[:, -1].nbytes for t in stores[0].pool.payload())  # null pages


def test_layers_whose_pages_differ_have_room_for_the_most_of_each():
    layers = [{"match": "1", "codec": {"format": "int8"}}]
    context = reserved(layers=layers)
    first, second, third = (layer.store for layer in context.sharded_layers)
    assert first.pool is third.pool is not second.pool
    alone = reserved(layers=layers, budget={"name": "pages", "pages": 3})
    for store, layer in zip((first, second), alone.sharded_layers):
        assert store.pool.null_page == len(store.common.sharers) * layer.store.pool.null_page


@pytest.mark.parametrize("fields, message", [
    ({"layers": [{"match": "0", "retention": "snapkv"}]}, r"\(h2o, snapkv\): give them one policy"),
    ({"budget": {"name": "bytes", "across_layers": 2}}, "across_layers"),
    ({"retention": "flexgen", "selector": "budget"}, "tiers .* budget.across_layers shares out"),
])
def test_what_cannot_be_compared_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        new_context(**fields)


def test_a_layer_may_stay_apart():
    budget = {"name": "share", "keep": 0.5}
    context = new_context(layers=[{"match": "1", "retention": "snapkv", "budget": budget}])
    first, apart, last = (layer.verdicts for layer in context.sharded_layers)
    assert not apart.peers and first.peers == last.peers == [first, last]
