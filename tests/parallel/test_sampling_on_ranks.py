"""Drawn pages count for those that they stand for, the same ones on any number of ranks."""

import math

import pytest
import torch
from layer_caches import HEADS, NUM_GROUPS, WIDTH, check_same_steps, new_context
from ranks import run_ranks
from test_reads import Sequence, grow

from pikv_megatron import PiKVConfig, process_groups

SIZES = dict(window=4, num_sinks=2, flush_interval=3, shard_after=0, token_shards=4, page_size=4)
CACHES = {
    "boxes": dict(sketch="bounding_box"),
    "keys, gathered": dict(sketch="keys", dispatcher="allgather"),
    "transformed": dict(sketch="keys", codec={"transform": "fastv"}),
}
EPSILON, COUNTS = 0.1, (60, *[1] * 9)


def run_cache(pg, name: str) -> dict:
    """Steps' outputs, and log-sum-exps of the cache and of one that reads everything."""
    rng = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, NUM_GROUPS, 80, WIDTH, generator=rng)
    found = {}
    for selector in ({"name": "sampled", "share": 0.1, "epsilon": EPSILON}, {"name": "all"}):
        config = PiKVConfig(**SIZES | CACHES[name] | {"selector": selector})
        context = new_context(config, 1, 90, pg.ep)
        layer = context.layers[1]
        home = pg.ep.size() - 1
        fed = [Sequence(context.start(home), home, keys, values, torch.zeros(80, 8))]
        rng.manual_seed(3)
        lses, outputs, read, attend = [], [], [], layer._attend_decode

        def attend_decode(query, plan):
            state = attend(query, plan)
            lses.append(state.lse[:, 0].tolist())
            return state

        layer._attend_decode = attend_decode
        layer.store.on_read = lambda reads, sealed, opened: read.append((sealed.lens > 0).sum())
        for count in COUNTS:
            query = torch.randn(count, 1, HEADS, WIDTH, generator=rng)
            own = query if pg.ep.rank() == home else query[:, :0]
            outputs.append(grow(context, layer, fed, count, own).tolist())
        context.check_integrity()
        found[selector["name"]] = {"lse": lses, "outputs": outputs, "read": int(sum(read))}
    return found


def run_caches(num_ranks: int) -> dict:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        return {name: run_cache(pg, name) for name in CACHES}


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_ranks(run_caches, 1, 1, timeout=200)[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_sample_stands_for_what_is_left(num_ranks, alone):
    by_rank = [alone] if num_ranks == 1 else run_ranks(run_caches, num_ranks, num_ranks)
    for name, found in by_rank[-1].items():
        sampled, whole = (torch.tensor(found[x]["lse"]) for x in ("sampled", "all"))
        error = (sampled - whole).abs()
        assert 0 < error.mean() and error.mean() < math.log1p(EPSILON), name
        read, held = (sum(each[name][x]["read"] for each in by_rank) for x in ("sampled", "all"))
        assert 0.1 * held < read < held
        check_same_steps(found["sampled"]["outputs"], alone[name]["sampled"]["outputs"], name)
