"""What is chosen at home is what is read on the owners, and the directory tells the truth.

Every rank draws the same keys, grows the same sequences and keeps all of them densely beside the
cache, so that attention over exactly the chosen tokens is known.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from pikv_megatron import PiKVConfig, PiKVInferenceContext, process_groups
from pikv_megatron.cache.step_plan import StepRow
from pikv_megatron.ops.dense_attention import dense_attention
from pikv_megatron.router.base import KVRouter
from pikv_megatron.selector.base import PageSelector
from pikv_megatron.sketch.registry import SKETCHERS

NUM_GROUPS, WIDTH, HEADS, SCALE = 2, 8, 4, 0.3
CPU = torch.device("cpu")
LAYOUTS = {
    "by position": dict(page_size=3, window=4, num_sinks=2, token_shards=4, sketch="mean_key"),
    "single tokens": dict(
        page_size=1, window=0, hash_block=1, token_shards=8, sketch="bounding_box"
    ),
    "by expert": dict(page_size=4, window=3, expert_shards=4, sketch="bounding_box"),
    "replicas": dict(page_size=2, window=5, expert_shards=8, replicas=2, sketch="mean_key"),
}


class DrawnRouter(KVRouter):
    """Visits random shards."""

    def __init__(self, num_shards: int, rank: int):
        self.num_shards, self.generator = num_shards, torch.Generator().manual_seed(rank)

    def visit(self, query, directory):
        shape = len(query), self.num_shards
        self.shards = torch.rand(shape, generator=self.generator) < 0.5
        self.shards[:, 0] |= ~self.shards.any(dim=1)
        return self.shards


class DrawnSelector(PageSelector):
    """Reads random pages."""

    def __init__(self, rank: int):
        self.generator = torch.Generator().manual_seed(100 + rank)

    def select(self, query, directory, shards):
        self.directory = directory
        drawn = torch.rand(directory.is_page.shape, generator=self.generator) < 0.6
        self.pages = directory.is_page & drawn
        return self.pages


@dataclass
class Sequence:
    """A cached sequence, its keys and values [ng, length, hn], its experts [length, 8]."""

    cached: object
    home: int
    keys: torch.Tensor
    values: torch.Tensor
    experts: torch.Tensor


def grow(context, layer, sequences, count: int, queries: torch.Tensor) -> torch.Tensor | None:
    """Feed every sequence `count` tokens; the attention output of this rank's."""
    by_rank = [[s for s in sequences if s.home == r] for r in range(context.num_ranks)]
    context.begin_step([[StepRow(s.cached, count) for s in own] for own in by_rank], CPU)
    own, plan = by_rank[context.rank], context.plan
    spans = [slice(s.cached.length, s.cached.length + count) for s in own]
    key, value = (
        torch.stack([getattr(s, name)[:, span] for s, span in zip(own, spans)]).permute(2, 0, 1, 3)
        if own else torch.zeros(count, 0, NUM_GROUPS, WIDTH)
        for name in ("keys", "values")
    )
    out = layer.attend(queries[:count, : len(own)], key, value, plan)
    experts = None
    if context.keeps_experts:
        chosen = [s.experts[span, : context.keeps_experts] for s, span in zip(own, spans)]
        experts = torch.stack(chosen) if own else torch.zeros(0, count, context.keeps_experts)
        experts = experts.to(torch.int16)
    layer.settle(plan, experts)
    context.finish_step()
    return out


def tokens_on_rank(context, store, sequences) -> dict:
    """Positions by (slot, column) for pages and by (slot, shard) for buffers, this rank's."""
    pages, buffers, placement = {}, {}, context.placement
    for s in sequences:
        for column, page in enumerate(store._pages(s.cached.slot).tolist()):
            place = int(store.pool.shard[page]), store.pool.position[page].tolist()
            pages[s.cached.slot, context.rank, column] = place
        for local in range(placement.shards_per_rank):
            group = s.cached.slot * placement.shards_per_rank + local
            length = int(store.buffers.lens(torch.tensor(group)))
            shard = local * placement.num_ranks + context.rank
            position = store.buffers.tensors["position"][group, :length]
            buffers[s.cached.slot, shard] = position.tolist()
    return {"pages": pages, "buffers": buffers}


def everywhere(context, store, sequences) -> tuple[dict, dict]:
    """`tokens_on_rank` of all ranks."""
    found = [None] * context.num_ranks
    mine = tokens_on_rank(context, store, sequences)
    if context.num_ranks > 1:
        dist.all_gather_object(found, mine, group=context.ep_group)
    else:
        found = [mine]
    return tuple(
        {place: tokens for part in found for place, tokens in part[kind].items()}
        for kind in ("pages", "buffers")
    )


def read_positions(context, s, row, router, selector, pages, buffers) -> list[int]:
    """What one sequence reads in shards, by the rules alone."""
    visited = router.shards[row].tolist()

    def counts_here(position: int, shard: int) -> bool:
        shards = replica_shards(context, s, position)
        return not any(visited[earlier] for earlier in shards[: shards.index(shard)])

    stored = [
        (shard, positions) for (slot, rank, column), (shard, positions) in pages.items()
        if slot == s.cached.slot and selector.pages[row, rank, column]
    ]
    stored += [
        (shard, positions) for (slot, shard), positions in buffers.items()
        if slot == s.cached.slot
    ]
    return [
        p for shard, positions in stored if visited[shard]
        for p in positions if counts_here(p, shard)
    ]


def replica_shards(context, s, position: int) -> list[int]:
    """Shards of a token, best expert first."""
    at = torch.tensor(position)
    if not context.keeps_experts:
        return [int(context.placement.shard(at, None))]
    experts = s.experts[position, : context.keeps_experts]
    return [int(context.placement.shard(at, expert)) for expert in experts]


def check_layout(pg, changes: dict, dispatcher: str) -> None:
    config = PiKVConfig(flush_interval=3, dispatcher=dispatcher, **changes)
    context = PiKVInferenceContext(2, 64, config, pg.ep)
    layer = context.layer(1, NUM_GROUPS, WIDTH, SCALE, torch.float32, CPU)
    num_shards = context.placement.num_shards
    router, selector = DrawnRouter(num_shards, context.rank), DrawnSelector(context.rank)
    layer._router, layer._selector = router, selector
    generator = torch.Generator().manual_seed(7)
    homes = [0] if context.num_ranks == 1 else [0, context.num_ranks - 1, 0]
    sequences = [
        Sequence(
            context.start(home), home,
            *torch.randn(2, NUM_GROUPS, 60, WIDTH, generator=generator),
            torch.rand(60, 8, generator=generator).argsort(dim=1),
        )
        for home in homes
    ]
    own = [s for s in sequences if s.home == context.rank]
    for count in (20, 1, 1, 9, 1, 1, 1, 1, 1, 1):
        past, flushed = sequences[0].cached.length, sequences[0].cached.flushed
        pages, buffers = everywhere(context, layer.store, sequences)
        query = torch.randn(count, 2, HEADS, WIDTH, generator=generator)
        out = grow(context, layer, sequences, count, query)
        context.check_integrity()
        if past == 0:
            continue
        check_directory(config, own, selector.directory, pages)
        for row, s in enumerate(own):
            near = [*range(min(config.num_sinks, past)), *range(flushed, past)]
            far = read_positions(context, s, row, router, selector, pages, buffers)
            check_output(s, near + far, past, count, query[:, row], out[:, row])
    context.reset()
    context.check_integrity()


def check_directory(config, own, directory, pages) -> None:
    for row, s in enumerate(own):
        listed = directory.is_page[row].nonzero().tolist()
        mine = {key: place for key, place in pages.items() if key[0] == s.cached.slot}
        assert {(s.cached.slot, *place) for place in listed} == set(mine)
        for (_, rank, column), (shard, positions) in mine.items():
            assert directory.shard[row, rank, column] == shard
            sketcher, page = SKETCHERS[config.sketch](), s.keys[:, positions].unsqueeze(1)
            expected = sketcher.allocate(
                NUM_GROUPS, 1, config.page_size, WIDTH, torch.float32, CPU
            )
            sketcher.write(page, expected, torch.tensor([0]))
            at = directory.table[row, rank, column]
            for kept, new in zip(directory.sketch, expected):
                torch.testing.assert_close(kept[:, at], new[:, 0])


def check_output(s, positions, past, count, query, out) -> None:
    assert len(set(positions)) == len(positions), "a token is counted twice"
    index = torch.tensor([*positions, *range(past, past + count)])
    mask = torch.ones(1, count, len(index), dtype=torch.bool)
    mask[0, :, len(positions) :] = torch.ones(count, count, dtype=torch.bool).tril()
    expected = dense_attention(
        query[None], s.keys[:, None, index], s.values[:, None, index], mask, SCALE
    )
    torch.testing.assert_close(out, expected.out[0], atol=1e-5, rtol=1e-4)


def check_layouts(num_ranks: int) -> None:
    with process_groups(expert_parallel_size=num_ranks, timeout_seconds=60) as pg:
        for changes in LAYOUTS.values():
            for dispatcher in ("alltoall", "allgather"):
                check_layout(pg, changes, dispatcher)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_chosen_pages_and_no_others_are_read(num_ranks):
    run_ranks(check_layouts, num_ranks, num_ranks, timeout=200)
