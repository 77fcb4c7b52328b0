"""What every retention policy and every budget promises, and what each one does."""

import pytest
import torch
from calibrations import drawn_calibration
from layer_caches import SHAPE, new_context

from pikv_megatron import PiKVConfig, PiKVInferenceContext
from pikv_megatron.cache.owner.pinned import Pinned
from pikv_megatron.options import members
from pikv_megatron.retention.adakv import AdaKVOptions
from pikv_megatron.retention.base import RetentionPolicy
from pikv_megatron.retention.budget import PagesBudget, RetentionBudget, ShareBudget
from pikv_megatron.retention.h2o import H2OPolicy
from pikv_megatron.retention.lru import LRUPolicy
from pikv_megatron.retention.lru_plus import LRUPlusPolicy
from pikv_megatron.retention.registry import Retention
from pikv_megatron.retention.snapkv import SnapKVPolicy
from pikv_megatron.retention.streaming import StreamingPolicy
from pikv_megatron.types import PageStats

POLICIES = {name: kind for name, kind in members(Retention).items() if kind.extra is None}
BUDGETS = members(RetentionBudget)


def policy_of(name: str) -> RetentionPolicy | None:
    """None where a budget of pages does not apply: all stay, or older ones become fewer."""
    policy = POLICIES[name]().build(drawn_calibration())
    return policy if policy is not None and policy.ageing is None else None


def drawn_stats(num_sequences: int = 4, num_columns: int = 9) -> PageStats:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, num_columns + 1, (num_sequences, 1), generator=generator)
    shape = num_sequences, num_columns
    newest = torch.stack([torch.randperm(99, generator=generator)[:num_columns]
                          for _ in range(num_sequences)])
    mass = torch.rand(*shape, 2, generator=generator)
    seen = torch.randint(0, 3, shape, generator=generator).float()
    return PageStats(
        torch.arange(num_columns) < counts, newest, torch.arange(num_columns).expand(shape) % 2,
        mass, seen, observed=torch.where(seen > 0, mass[..., 0], -1.0),
        last_used=newest + torch.randint(-9, 9, shape, generator=generator),
        uses=torch.rand(shape, generator=generator) * seen,
        score=torch.rand(*shape, 1, generator=generator),
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("limit", [0, 1, 4, 100])
def test_as_many_pages_stay_as_the_limit_says(name, limit):
    policy, stats = policy_of(name), drawn_stats()
    if policy is None:
        return
    drop = policy.drop(stats, torch.full((4, 2), limit))
    assert drop.dtype == torch.bool and not (drop & ~stats.is_page).any()
    for shard in range(2):
        is_page = stats.is_page & (stats.shard == shard)
        kept, most = (is_page & ~drop).sum(1), is_page.sum(1).clamp(max=limit)
        assert torch.equal(kept, most) if name != "adakv" else (kept <= most).all()


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_shard_keeps_does_not_depend_on_the_others_of_its_rank(name):
    policy, both = policy_of(name), drawn_stats()
    if policy is None:
        return
    together = policy.drop(both, torch.full((4, 2), 2))
    for shard in range(2):
        alone = PageStats(*(x[:, shard::2] for x in both))
        apart = policy.drop(alone._replace(shard=0 * alone.shard), torch.full((4, 1), 2))
        assert torch.equal(together[:, shard::2], apart)


def kept_columns(policy, limit: int, **fields) -> list[int]:
    newest = torch.tensor([fields.pop("newest")])
    fields = {name: torch.tensor([values]) for name, values in fields.items()}
    stats = PageStats(torch.ones_like(newest, dtype=torch.bool), newest, 0 * newest, **fields)
    return (~policy.drop(stats, torch.tensor([[limit]]))[0]).nonzero().flatten().tolist()


def test_streaming_keeps_the_newest():
    assert kept_columns(StreamingPolicy(), 2, newest=[50, 7, 99, 12]) == [0, 2]


def test_h2o_keeps_the_heaviest_per_query_and_what_no_query_has_seen():
    mass = [[0.1, 0.1], [0.2, 0.2], [0.5, 0.4], [0.0, 0.0], [0.0, 0.0]]
    seen = [1.0, 1.0, 9.0, 0.0, 0.0]
    fields = dict(newest=[1, 2, 3, 4, 5], mass=mass, seen=seen)
    assert kept_columns(H2OPolicy(), 3, **fields) == [1, 3, 4]
    assert kept_columns(H2OPolicy(), 1, **fields) == [4]


def test_snapkv_listens_to_the_last_prompt_alone_and_keeps_what_came_later():
    fields = dict(newest=[1, 2, 3, 4], mass=[[9.0], [1.0], [1.0], [9.0]], seen=[9.0, 9.0, 9.0, 4.0])
    assert kept_columns(SnapKVPolicy(), 2, observed=[0.1, 0.3, 0.2, -1.0], **fields) == [1, 3]


def test_lru_drops_what_was_unused_for_longest():
    """A page that was never used counts from when it was filled."""
    fields = dict(newest=[10, 20, 30, 40], last_used=[90, 25, -1, -1])
    assert kept_columns(LRUPolicy(), 3, **fields) == [0, 2, 3]
    assert kept_columns(LRUPolicy(), 1, **fields) == [0]


def test_lru_plus_weighs_a_use_as_tokens_of_recency():
    fields = dict(newest=[10, 20, 30], last_used=[50, 60, 70], uses=[9.0, 1.0, 2.0])
    assert kept_columns(LRUPlusPolicy(frequency=0.0), 1, **fields) == [2]
    assert kept_columns(LRUPlusPolicy(frequency=4.0), 1, **fields) == [0]


def test_adakv_keeps_the_fewest_pages_that_hold_the_target():
    fields = dict(newest=[1, 2, 3, 4, 5], seen=[2.0, 2.0, 2.0, 2.0, 0.0], last_used=[-1] * 5,
                  uses=[0.0] * 5)
    mass = [[0.6], [0.2], [1.1], [0.1], [0.0]]  # of 2.0; the last page no query has seen

    def kept(target: float, limit: int = 9) -> list[int]:
        options = AdaKVOptions(target=target, recency=0, frequency=0)
        return kept_columns(options.build(), limit, mass=mass, **fields)

    assert kept(0.5) == [2, 4] and kept(0.6) == [0, 2, 4] and kept(0.9) == [0, 1, 2, 4]
    assert kept(1.0) == [0, 1, 2, 3, 4] and kept(1.0, limit=2) == [2, 4]


@pytest.mark.parametrize("name", POLICIES)
def test_pinned_pages_stay_and_fill_the_budget_first(name):
    policy, stats = policy_of(name), drawn_stats()
    if policy is None:
        return
    oldest, limit = stats.newest - 3, torch.full((4, 2), 2)
    others, left = Pinned(num_tokens=40, most_pages=9).set_aside(stats, oldest, limit)
    drop = policy.drop(others, left)
    is_pinned = stats.is_page & (oldest < 40)
    assert is_pinned.any() and not (drop & is_pinned).any()
    for shard in range(2):
        is_own = stats.is_page & (stats.shard == shard)
        kept, pinned = (is_own & ~drop).sum(1), (is_own & is_pinned).sum(1)
        assert (kept <= pinned.clamp(min=2)).all()


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_budget_never_falls_and_never_exceeds_what_there_is(name, num_shards):
    sealed = torch.arange(40)
    budget = BUDGETS[name]().in_store(2**20, 10, num_shards)
    limit = budget.limit(sealed)
    assert limit.dtype == torch.int64 and (limit <= sealed).all() and (limit.diff() >= 0).all()
    for total in range(40):
        spread = torch.randint(num_shards, (total,)).bincount(minlength=num_shards)
        assert int(budget.limit(spread).sum()) <= budget.most(total, num_shards) <= total


def test_budgets_mean_what_they_say():
    sealed = torch.tensor([0, 1, 8, 100])
    assert ShareBudget(keep=0.25).limit(sealed).tolist() == [0, 1, 2, 25]
    assert PagesBudget(pages=3).limit(sealed).tolist() == [0, 1, 3, 3]


BYTES = 100_000


@pytest.mark.parametrize("fields", [
    {}, {"retention": "snapkv"},
    {"codec": {"format": {"name": "aged", "young": 1, "new": "int8", "old": "int4"}}},
])
def test_bytes_are_filled_and_never_exceeded(fields):
    """Whatever is kept of a page is counted."""
    budget = {"name": "bytes", "bytes": BYTES}
    fields = {"retention": "h2o", "token_shards": 4, "page_size": 16} | fields
    near = SHAPE._replace(sliding_window=32)
    specs = PiKVConfig(**fields, budget=budget).resolve([SHAPE, near, SHAPE])
    context = PiKVInferenceContext(3, 4096, PiKVConfig(**fields, budget=budget), specs)
    taken = 0
    for layer in context.sharded_layers:
        store = layer.store
        most = 3 * store.keeper.num_columns(context.most_pages)
        taken += store.growth_bytes(most)
        one_more = store.growth_bytes(most + 3 * 4)
    assert len(context.sharded_layers) == 2
    assert taken <= BYTES < 2 * one_more


def test_bytes_for_less_than_a_page_are_refused():
    config = PiKVConfig(retention="h2o", budget={"name": "bytes", "bytes": "8KiB"})
    with pytest.raises(ValueError, match="budget.bytes leaves a layer 8.0KiB, and one page of"):
        new_context(config, 4, 4096)


def test_a_pyramid_keeps_the_mean_and_less_from_layer_to_layer():
    config = PiKVConfig(retention="h2o", budget={"name": "pyramid", "keep": 0.4})
    keep = [spec.options.budget.keep for spec in config.resolve([SHAPE] * 5)]
    assert keep == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2])
    assert config.resolve([SHAPE])[0].options.budget.keep == 0.4
    with pytest.raises(ValueError, match="budget.keep 0.8 and budget.steepness 0.5 give the first"):
        PiKVConfig(retention="h2o", budget={"name": "pyramid", "keep": 0.8})
