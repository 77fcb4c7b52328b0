"""Page scores from sketches: what they estimate, what they bound and what they choose."""

import pytest
import torch
from guarded_pools import SKETCHES
from hypothesis import given, settings
from sketch_cases import ScoreSpec, build, check_choice, exact_logit, expected_logit, score_specs

from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.types import BoundingBoxSketch, LowRankSketch, MeanKeySketch

pytestmark = pytest.mark.usefixtures("path")


def check(spec: ScoreSpec) -> None:
    case = build(spec)
    scores = score_pages(*case.arguments)
    if not spec.bound or spec.sketch == "box":
        right = expected_logit(case)
        torch.testing.assert_close(scores.logit.double(), right, atol=5e-5, rtol=5e-6)
    if spec.bound:
        exact = exact_logit(case)
        assert (scores.logit.double() >= exact - 1e-5 - exact.abs() * 2e-6).all()
    check_choice(scores, case.arguments[3], spec.k)


@settings(deadline=None, max_examples=80)
@given(score_specs(max_columns=12))
def test_every_sketch_and_statistic(spec):
    check(spec)


@pytest.mark.parametrize("is_run", [True, False])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_many_pages(sketch, is_run):
    check(ScoreSpec(sketch, 2, 900, 1, 2, 33, 12, 63, "mass", False, torch.float32, is_run, 1))


@settings(deadline=None, max_examples=60)
@given(score_specs(max_columns=40))
def test_bounds_are_above_the_exact_logits(spec):
    if spec.sketch != "mean":
        check(spec._replace(bound=True))


def test_bounds_are_no_wider_than_promised():
    """A query along one channel: half a scale, and nothing else, above the sketch's own logit."""
    spec = ScoreSpec("low rank 4", 1, 20, 1, 1, 16, 16, 3, "best", True, torch.float32, True, 7)
    query, sketch, *rest, residual, _ = build(spec).arguments
    query = torch.zeros_like(query)
    query[..., 3] = -2.0
    above = score_pages(query, sketch, *rest, torch.zeros_like(residual), True).logit
    own = score_pages(query, sketch, *rest).logit
    step = sketch.scale[0, rest[0][0], 3].float() * 2.0 * rest[3] / 2
    is_listed = rest[1][0] > 0
    torch.testing.assert_close((above - own)[0, 0, is_listed], step[is_listed], rtol=2e-2, atol=0)


@pytest.mark.parametrize("is_run", [True, False])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_one_sequence_at_a_time_gives_the_same(sketch, is_run):
    spec = ScoreSpec(sketch, 5, 70, 2, 3, 16, 8, 4, "mass", False, torch.float32, is_run, 2)
    query, sketch, table, lens, *rest = build(spec).arguments
    scores = score_pages(query, sketch, table, lens, *rest)
    for row in range(spec.n):
        own = slice(row, row + 1)
        alone = score_pages(query[own], sketch, table[own], lens[own], *rest[:3], rest[3][own],
                            rest[4])
        torch.testing.assert_close(scores.logit[own], alone.logit, atol=1e-5, rtol=1e-6)


def test_nothing_is_ranked_where_nothing_is_chosen(monkeypatch):
    spec = ScoreSpec("mean", 3, 9, 2, 2, 16, 1, 0, "mass", False, torch.float32, False, 5)
    arguments = build(spec).arguments
    monkeypatch.setattr(torch.Tensor, "topk", None)
    assert score_pages(*arguments).chosen.shape == (3, 0)


def test_equal_pages_are_chosen_from_the_left():
    sketch = MeanKeySketch(torch.ones(1, 1, 4))
    table = torch.zeros(1, 9, dtype=torch.int64)
    lens = torch.tensor([[3, 0, 3, 3, 0, 3, 3, 3, 3]], dtype=torch.int32)
    scores = score_pages(torch.ones(1, 1, 4), sketch, table, lens, 4, 1.0, "mass")
    assert scores.chosen.tolist() == [[0, 2, 3, 5]]


def test_the_example_of_the_docstring():
    sketch = MeanKeySketch(torch.tensor([1.0, 2, 3]).view(1, 3, 1))
    lens = torch.tensor([[4, 0, 4]], dtype=torch.int32)
    scores = score_pages(torch.ones(1, 1, 1), sketch, torch.arange(3)[None], lens, 1, 1.0, "best")
    assert scores.logit.flatten().tolist() == [1, -torch.inf, 3]
    right = torch.tensor([[0.1192, 0, 0.8808]])
    torch.testing.assert_close(scores.score, right, atol=1e-4, rtol=0)
    assert scores.chosen.item() == 2


MEAN = MeanKeySketch(torch.ones(1, 1, 4))
BOX = BoundingBoxSketch(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
LOW_RANK = LowRankSketch(
    torch.zeros(1, 1, 1, 4, dtype=torch.uint8), torch.ones(1, 1, 4).half(),
    torch.ones(1, 1, 4).half(), torch.ones(1, 1), 4,
)


@pytest.mark.parametrize("sketch, k, scale, statistic, bound, message", [
    (BOX, -1, 1.0, "mass", False, "k is -1"),
    (BOX, 1, -1.0, "mass", False, "softmax_scale is -1.0"),
    (BOX, 1, 1.0, "sum", False, "statistic is 'sum'"),
    (MEAN, 1, 1.0, "mass", True, "mean keys, which bound nothing"),
    (LOW_RANK, 1, 1.0, "mass", True, "query_residual is None"),
])
def test_what_cannot_be_scored_is_refused(sketch, k, scale, statistic, bound, message):
    lens = torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        score_pages(torch.ones(1, 1, 4), sketch, lens.long() * 0, lens, k, scale, statistic,
                    None, bound)
