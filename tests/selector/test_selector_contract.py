"""What every selector promises, and what each one does."""

import math

import pytest
import torch
from directories import drawn_ask
from pydantic import ValidationError

from pikv_megatron.options import members
from pikv_megatron.selector.base import ranked
from pikv_megatron.selector.budget import BudgetOptions
from pikv_megatron.selector.certified import CertifiedOptions
from pikv_megatron.selector.mass import MassOptions
from pikv_megatron.selector.registry import Selector

SELECTORS = members(Selector)


def select(options, ask, may_read=None) -> torch.Tensor:
    may_read = ask.is_page if may_read is None else may_read
    return options.build().select(ask, may_read, ask.is_page.shape[1])


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("num_sequences", [0, 3])
@pytest.mark.parametrize("is_routed", [False, True])
def test_pages_are_chosen_once_and_of_those_that_may_be_read(name, num_sequences, is_routed):
    ask = drawn_ask(num_sequences, num_ranks=2, num_shards=4)
    may_read = ask.is_page & (torch.rand(ask.is_page.shape) > 0.5) if is_routed else ask.is_page
    if SELECTORS[name]().build() is None:
        return
    columns = select(SELECTORS[name](), ask, may_read)
    assert columns.dtype == torch.int64 and len(columns) == num_sequences
    for row, chosen in enumerate(columns.tolist()):
        chosen = [column for column in chosen if column >= 0]
        assert len(set(chosen)) == len(chosen) and all(may_read[row, c] for c in chosen)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_a_budget_reads_that_share_of_the_best_pages(share):
    ask = drawn_ask(5, num_ranks=2, num_shards=4, seed=3)
    columns = select(BudgetOptions(share=share), ask)
    for chosen, is_page, scores in zip(columns, ask.is_page, ask.page_scores):
        chosen = chosen[chosen >= 0]
        assert len(chosen) == math.ceil(share * int(is_page.sum()))
        best = scores.sort(descending=True).values[: len(chosen)]
        assert torch.equal(scores[chosen].sort(descending=True).values, best)


def test_a_budget_reads_that_number_of_pages_or_all_there_are():
    ask = drawn_ask(5, num_ranks=2, num_shards=4, seed=3)
    columns = select(BudgetOptions(pages=4), ask)
    assert torch.equal((columns >= 0).sum(1), ask.is_page.sum(1).clamp(max=4))


@pytest.mark.parametrize("share", [0.1, 0.8, 0.999, 1.0])
def test_mass_reads_the_fewest_pages_that_reach_the_share(share):
    ask = drawn_ask(5, num_ranks=2, num_shards=4, seed=3)
    columns = select(MassOptions(share=share), ask)
    for chosen, is_page, scores in zip(columns, ask.is_page, ask.page_scores):
        chosen = chosen[chosen >= 0]
        if share == 1.0 or not is_page.any():
            assert len(chosen) == int(is_page.sum())
            continue
        falling = scores[chosen].sort(descending=True).values
        assert falling.sum() >= share - 1e-6 and falling[:-1].sum() < share


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.3])
def test_certified_reads_the_fewest_pages_that_leave_no_more_than_the_tolerance(tolerance):
    ask = drawn_ask(5, num_ranks=2, num_shards=4, seed=3)
    columns = select(CertifiedOptions(tolerance=tolerance), ask)
    lower, upper = (x.double().exp() for x in ask.page_bounds)
    near = ask.near_lse.double().exp()

    def most_left(row: int, chosen: torch.Tensor) -> float:
        left = upper[row][:, ~chosen].sum(1)
        return float((left / (near[row] + lower[row][:, chosen].sum(1) + left)).max())

    for row, is_page in enumerate(ask.is_page):
        chosen = ~ask.is_left(columns)[row] & is_page
        if not is_page.any() or tolerance == 0.0:
            assert torch.equal(chosen, is_page)
            continue
        assert most_left(row, chosen) <= tolerance
        last = columns[row][columns[row] >= 0]
        if len(last):
            chosen[last[-1]] = False
            assert most_left(row, chosen) > 0.99 * tolerance


def test_of_equals_the_lower_column_comes_first():
    scores = torch.tensor([[0.2, 0.5, 0.2, 0.1]])
    columns, may = ranked(scores, torch.tensor([[True, False, True, True]]), 2)
    assert columns.tolist() == [[0, 2]] and may.all()


def test_a_share_and_a_number_exclude_each_other():
    with pytest.raises(ValidationError, match="selector.share and selector.pages"):
        BudgetOptions(share=0.5, pages=3)
