"""A sample stands for what it was drawn from, to within the error that was asked for."""

import torch
from directories import KnownJudge

from pikv_megatron.relevance import Ask
from pikv_megatron.selector.lots import lots
from pikv_megatron.selector.sampled import SampledOptions
from pikv_megatron.types import Directory

HEADS, PAGES = 2, 300
EPSILON, DELTA = 0.05, 0.1


def asked(num_queries: int, order: torch.Tensor, spread: float) -> Ask:
    """The same pages for queries at several positions; a page's logits belong to its tokens."""
    rng = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(HEADS, PAGES, generator=rng)[:, order]
    newest = (16 * torch.arange(PAGES) + 15)[order].expand(num_queries, -1)
    is_page = torch.ones(num_queries, PAGES, dtype=torch.bool)
    judge = KnownJudge(logits.expand(num_queries, -1, -1), is_page)
    table = torch.arange(PAGES).expand(num_queries, 1, -1)
    directory = Directory(table, is_page.unsqueeze(1), 0 * table, 1, newest.unsqueeze(1))
    queries = torch.arange(num_queries)
    near = torch.full((num_queries, HEADS), 4.0)
    return Ask(torch.zeros(num_queries, HEADS, 8), queries, 9000 + queries, directory, judge, near)


def drawn(ask: Ask, **fields):
    """Which pages are read and which are drawn [n, M], bool, and what a drawn one counts for."""
    selector = SampledOptions(**{"epsilon": EPSILON, "delta": DELTA} | fields).build()
    columns = selector.select(ask, ask.is_page, PAGES)
    sample = selector.draw(ask, columns)
    assert columns.shape[1] == selector.num_columns(PAGES)
    assert sample.columns.shape[1] == selector.num_drawn(PAGES)
    return ~ask.is_left(columns), ~ask.is_left(sample.columns), sample.log_weight.exp()


def test_the_denominator_errs_by_epsilon_as_often_as_was_said():
    ask = asked(400, torch.arange(PAGES), spread=1.0)
    is_read, is_drawn, weight = drawn(ask)
    assert not (is_read & is_drawn).any()
    assert 0 < is_drawn.float().mean() < 0.7
    # What was drawn stands for all that was left.
    torch.testing.assert_close(weight * is_drawn.sum(1), (~is_read).sum(1).float())
    exps, near = ask.page_logits.double().exp(), ask.near_lse.double().exp()
    counted = is_read.double() + is_drawn * weight.unsqueeze(1)
    estimate = near + torch.einsum("nhm,nm->nh", exps, counted.double())
    error = (estimate / (near + exps.sum(2)) - 1).abs()
    assert error.mean() > EPSILON / 20 and (error > EPSILON).double().mean() < 1.5 * DELTA


def test_more_is_drawn_where_less_may_be_lost_or_pages_differ_more():
    counts = [
        drawn(asked(8, torch.arange(PAGES), spread), epsilon=epsilon)[1].sum()
        for epsilon, spread in ((0.2, 1.0), (0.05, 1.0), (0.05, 0.3))
    ]
    assert 0 < counts[0] < counts[1] > counts[2] > 0


def test_a_page_draws_its_lot_wherever_it_is_listed():
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))
    straight, mixed = (drawn(asked(6, o, 1.0)) for o in (torch.arange(PAGES), order))
    for one, other in zip(straight[:2], mixed[:2]):
        assert torch.equal(one[:, order], other)
    assert not torch.equal(straight[1][0], straight[1][1])  # other queries, other lots
    assert not torch.equal(drawn(asked(6, order, 1.0), seed=1)[1], mixed[1])


def test_lots_are_uniform_and_belong_to_what_they_are_for():
    columns = torch.arange(4096)
    first, second = torch.tensor(1), torch.tensor(2)
    one, other = lots(0, first, columns), lots(0, second, columns)
    for drawn_lots in (one, other, lots(1, first, columns)):
        share = drawn_lots.double() / 2**31
        assert 0 <= share.min() and share.max() < 1 and abs(share.mean() - 0.5) < 0.02
        assert len(drawn_lots.unique()) > 4090
    assert abs(torch.corrcoef(torch.stack([one, other]).double())[0, 1]) < 0.06
