"""The Triton source of page scores against torch."""

import pytest
import torch
from guarded_pools import SKETCHES
from hypothesis import given, settings
from sketch_cases import ScoreSpec, build, check_choice, score_specs

from pikv_megatron.ops.score_pages import score_pages as torch_scores
from pikv_megatron.types import PageScores


@pytest.fixture(scope="module")
def score_pages(triton_kernel):
    return triton_kernel("score_pages")


def check(score_pages, spec: ScoreSpec, device) -> None:
    case = build(spec, device)
    scores = PageScores(*score_pages(*case.arguments))
    right = torch_scores(*case.arguments)
    torch.testing.assert_close(scores.logit, right.logit, atol=5e-5, rtol=5e-6)
    torch.testing.assert_close(scores.score, right.score, atol=1e-5, rtol=1e-3)
    check_choice(scores, case.arguments[3], spec.k)


@settings(deadline=None, max_examples=30)
@given(score_specs(max_columns=40))
def test_every_sketch_and_statistic(score_pages, device, spec):
    check(score_pages, spec, device)


@pytest.mark.parametrize("statistic, bound", [("mass", False), ("mass", True), ("best", True)])
@pytest.mark.parametrize("sketch", SKETCHES[1:])
def test_bounds(score_pages, device, sketch, statistic, bound):
    spec = ScoreSpec(sketch, 2, 40, 1, 3, 20, 12, 5, statistic, bound, torch.float32, False, 3)
    check(score_pages, spec, device)


def test_many_heads_a_group_and_pages_of_500_tokens(score_pages, device):
    check(score_pages, ScoreSpec("low rank 2", 1, 5, 2, 32, 80, 500, 3, "mass", True,
                                 torch.bfloat16, False, 3), device)


def test_thousands_of_pages(score_pages, device):
    check(score_pages, ScoreSpec("mean", 1, 5000, 1, 4, 16, 1, 500, "mass", False, torch.float32,
                                 False, 3), device)


@pytest.mark.parametrize("k", [1, 700, 2500, 4000])
def test_the_choice_among_equals_and_extremes(triton_kernel, device, k):
    """Few distinct scores, over several blocks; zeros and the smallest numbers among them."""
    rng = torch.Generator().manual_seed(k)
    values = torch.tensor([0.0, 1e-45, 2.0**-126, 0.25, 0.25 + 2.0**-26, 1.0])
    score = values[torch.randint(0, 6, (2, 3000), generator=rng)]
    lens = torch.randint(0, 3, score.shape, generator=rng).int()
    chosen = triton_kernel("select_topk")(score.to(device), lens.to(device), k).cpu()
    for row in range(2):
        listed = lens[row].nonzero().flatten().tolist()
        best = sorted(sorted(listed, key=lambda c: (-float(score[row, c]), c))[:k])
        assert chosen[row].tolist() == best + [-1] * (k - len(best))
