"""What every retention policy and every budget promises, and what each one does."""

import pytest
import torch

from pikv_megatron.options import members
from pikv_megatron.retention.budget import PagesBudget, RetentionBudget, ShareBudget
from pikv_megatron.retention.h2o import H2OPolicy
from pikv_megatron.retention.registry import Retention
from pikv_megatron.retention.streaming import StreamingPolicy
from pikv_megatron.types import PageStats

POLICIES, BUDGETS = members(Retention), members(RetentionBudget)


def drawn_stats(num_sequences: int = 4, num_columns: int = 9) -> PageStats:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, num_columns + 1, (num_sequences, 1), generator=generator)
    shape = num_sequences, num_columns
    newest = torch.stack([torch.randperm(99, generator=generator)[:num_columns]
                          for _ in range(num_sequences)])
    mass = torch.rand(*shape, 2, generator=generator)
    seen = torch.randint(0, 3, shape, generator=generator).float()
    return PageStats(torch.arange(num_columns) < counts, newest, mass, seen)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("limit", [0, 1, 4, 100])
def test_as_many_pages_stay_as_the_limit_says(name, limit):
    policy, stats = POLICIES[name]().build(), drawn_stats()
    if policy is None:
        return
    drop = policy.drop(stats, torch.full((4,), limit))
    assert drop.dtype == torch.bool and not (drop & ~stats.is_page).any()
    kept = (stats.is_page & ~drop).sum(1)
    assert torch.equal(kept, stats.is_page.sum(1).clamp(max=limit))


def kept_columns(policy, limit: int, **fields) -> list[int]:
    newest = torch.tensor([fields.pop("newest")])
    stats = PageStats(torch.ones_like(newest, dtype=torch.bool), newest, **fields)
    return (~policy.drop(stats, torch.tensor([limit]))[0]).nonzero().flatten().tolist()


def test_streaming_keeps_the_newest():
    assert kept_columns(StreamingPolicy(), 2, newest=[50, 7, 99, 12]) == [0, 2]


def test_h2o_keeps_the_heaviest_per_query_and_what_no_query_has_seen():
    mass = torch.tensor([[[0.1, 0.1], [0.2, 0.2], [0.5, 0.4], [0.0, 0.0], [0.0, 0.0]]])
    seen = torch.tensor([[1.0, 1.0, 9.0, 0.0, 0.0]])
    fields = dict(newest=[1, 2, 3, 4, 5], mass=mass, seen=seen)
    assert kept_columns(H2OPolicy(), 3, **fields) == [1, 3, 4]
    assert kept_columns(H2OPolicy(), 1, **fields) == [4]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_never_falls_and_never_exceeds_what_there_is(name):
    sealed = torch.arange(40)
    limit = BUDGETS[name]().limit(sealed, 2)
    assert limit.dtype == torch.int64 and (limit <= sealed).all() and (limit.diff() >= 0).all()
    assert [BUDGETS[name]().most(n, 2) for n in range(40)] == limit.tolist()


def test_budgets_mean_what_they_say():
    sealed = torch.tensor([0, 1, 8, 100])
    assert ShareBudget(keep=0.25).limit(sealed, 2).tolist() == [0, 1, 2, 25]
    assert PagesBudget(pages=3).limit(sealed, 2).tolist() == [0, 1, 6, 6]
