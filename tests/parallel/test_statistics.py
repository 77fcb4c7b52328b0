"""The mass that an owner holds for a page is the true softmax mass of its queries."""

import pytest
import torch
import torch.distributed as dist
from layer_caches import HEADS, NUM_GROUPS, SCALE, SHAPE, WIDTH, new_context
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVInferenceContext, process_groups
from pikv_megatron.cache.step_rows import StepRow

CPU = torch.device("cpu")
GROUP = HEADS // NUM_GROUPS
# Nothing is dropped, so that every page can be followed.
KEEPS = dict(
    page_size=3, window=5, num_sinks=2, flush_interval=3,
    retention={"name": "h2o", "observation_window": 4}, budget={"name": "share", "keep": 1.0},
)
METHODS = {
    "plain": {},
    "codec": {"codec": {"transform": {"name": "svd", "rank": WIDTH}}},
    "routed": {"router": {"name": "top_k", "k": 4}, "sketch": "mean_key"},
}
LENGTH = 60


def true_masses(keys: torch.Tensor, query: torch.Tensor, position: int) -> torch.Tensor:
    """[ng, position + 1]: each token's share of the attention, summed over a group's heads."""
    seen = keys[:, : position + 1].double().repeat_interleave(GROUP, dim=0)
    weights = (torch.einsum("hw,htw->ht", query.double(), seen) * SCALE).softmax(1)
    assert torch.allclose(weights.sum(1), torch.ones(HEADS).double())
    return weights.unflatten(0, (NUM_GROUPS, GROUP)).sum(1)


def held_masses(context, layer, slot: int) -> dict:
    """Masses [ng] and queries seen by the positions of a page, of all ranks."""
    store = layer.store
    mine = {
        tuple(store.pool.position[page].tolist()):
            (store.statistics.mass[page].tolist(), float(store.statistics.seen[page]))
        for page in store.table.pages_of(slot)
    }
    found = [mine]
    if context.num_ranks > 1:
        found = [None] * context.num_ranks
        dist.all_gather_object(found, mine, group=context.ep_group)
    return {place: value for part in found for place, value in part.items()}


def check(pg, fields: dict, dispatcher: str) -> None:
    ranks = pg.ep.size()
    config = PiKVConfig(token_shards=4, shard_after=0, dispatcher=dispatcher, **KEEPS, **fields)
    context = new_context(config, 1, LENGTH, pg.ep if ranks > 1 else None)
    layer, home = context.layers[1], ranks - 1
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, NUM_GROUPS, LENGTH, WIDTH, generator=generator)
    queries = torch.randn(LENGTH, HEADS, WIDTH, generator=generator)
    sequence, expected = context.start(home), {}
    sealed_at: dict = {}
    for count in (40, 1, 1, 1, 1, 1, 1, 1, 1):
        first = sequence.length
        rows = [[] for _ in range(ranks)]
        rows[home] = [StepRow(sequence, count)]
        context.begin_step(rows, CPU)
        span = slice(first, first + (count if context.rank == home else 0))
        layer.attend(
            queries[span], keys[:, span].transpose(0, 1), values[:, span].transpose(0, 1),
            context.plan,
        )
        known = set(held_masses(context, layer, sequence.slot))
        layer.settle(context.plan, None)
        context.finish_step()
        held = held_masses(context, layer, sequence.slot)
        for place in set(held) - known:
            sealed_at[place] = first + count
        # The last queries of a prompt, or a decode step's own, judge the pages that there are.
        judged = range(first + count - min(4, count), first + count)
        for position in judged:
            mass = true_masses(keys, queries[position], position)
            for place in held if count > 1 else known:
                share = mass[:, list(place)].sum(1)
                expected[place] = expected.get(place, 0.0) + share
    final = held_masses(context, layer, sequence.slot)
    pending = sequence.length - 1  # on several ranks the last step's is credited with the next
    assert len(final) > 8
    for place, (mass, seen) in final.items():
        right = expected.get(place, torch.zeros(NUM_GROUPS).double())
        if ranks > 1 and sealed_at[place] < sequence.length:
            right = right - true_masses(keys, queries[pending], pending)[:, list(place)].sum(1)
        torch.testing.assert_close(torch.tensor(mass).double(), right, atol=1e-5, rtol=1e-5)
        by_prompt = 4 if sealed_at[place] <= 40 else 0
        assert seen == float(by_prompt + decode_steps(sealed_at[place], ranks))


def decode_steps(sealed_at: int, ranks: int) -> int:
    """Decode steps that a page has been seen in, and credited for."""
    last = 48 if ranks == 1 else 47
    return max(0, last - max(40, sealed_at))


def check_all(num_ranks: int) -> None:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for fields in METHODS.values():
            for dispatcher in ("alltoall", "allgather"):
                check(pg, fields, dispatcher)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_mass_held_is_the_true_mass(num_ranks):
    run_ranks(check_all, num_ranks, num_ranks, timeout=120)


def test_a_slot_beyond_what_sixteen_bits_count_is_observed():
    """bfloat16 holds no integer between 256 and 258."""
    kv = SHAPE.kv._replace(dtype=torch.bfloat16)
    config = PiKVConfig(shard_after=0, page_size=4, window=3, num_sinks=1, retention="h2o")
    context = PiKVInferenceContext(258, 40, config, config.resolve([SHAPE._replace(kv=kv)]))
    layer, sequence = context.layers[1], [context.start(0) for _ in range(258)][257]
    context.begin_step([[StepRow(sequence, 30)]], CPU)
    keys = torch.randn(30, NUM_GROUPS, WIDTH).bfloat16()
    layer.attend(torch.randn(30, HEADS, WIDTH).bfloat16(), keys, keys, context.plan)
    layer.settle(context.plan, None)
    kept = layer.store.table.pages_of(257)
    assert len(kept) and (layer.store.statistics.seen[kept] == 4).all()
