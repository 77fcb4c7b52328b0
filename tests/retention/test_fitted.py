"""Policies that were fitted to a model say what they are meant to."""

import math

import pytest
import torch
from calibrations import drawn_calibration
from layer_caches import SHAPE

from pikv_megatron import PiKVConfig
from pikv_megatron.ops.rotation import unrotated
from pikv_megatron.retention.expected_attention import ExpectedAttentionOptions
from pikv_megatron.retention.quest import QuestOptions
from pikv_megatron.retention.scorer import train
from pikv_megatron.types import PageStats

FITTED = drawn_calibration()
POSITIONS = torch.arange(12).view(3, 4) * 5


def rotated_keys(seed: int = 0, shift: int = 0) -> torch.Tensor:
    """[2, 3, 4, 8], the same before RoPE whatever the shift of their positions."""
    keys = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(seed))
    angles = FITTED["rotary.angles"]
    turned = unrotated(keys, -(POSITIONS.flatten() + shift), angles, False)
    return turned.transpose(0, 1).view(2, 3, 4, 8)


def test_expected_attention_is_the_mean_over_the_queries_that_are_expected():
    """With one distance, the mean over drawn queries of exp(q . k), times the norm of the value."""
    policy = ExpectedAttentionOptions(horizon=1).build(FITTED)
    keys = 0.4 * rotated_keys()  # a mean of 100,000 exponentials has to be near its limit
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    scores = policy.score_pages(keys, values, POSITIONS)
    assert scores.shape == (3, 4)
    queries = torch.distributions.MultivariateNormal(
        FITTED["queries.mean"].double(),
        FITTED["queries.covariance"].double() + 1e-9 * torch.eye(8),
    )
    torch.manual_seed(0)
    drawn = queries.sample((100_000,))  # [draws, np, w]
    for page in range(3):
        total = torch.zeros(4).double()
        for token in range(4):
            at = torch.full((len(drawn),), -int(POSITIONS[page, token]) - 1)
            query = unrotated(drawn, at, FITTED["rotary.angles"], False)
            for head in range(4):
                key, value = (x[head // 2, page, token].double() for x in (keys, values))
                total[head] += (query[:, head] @ key).exp().mean() * value.norm()
        torch.testing.assert_close(scores[page].double().exp(), total, rtol=0.05, atol=0)


@pytest.mark.parametrize("options", [ExpectedAttentionOptions(), QuestOptions()])
def test_a_page_is_worth_the_same_wherever_it_stands(options):
    policy = options.build(FITTED)
    values = torch.randn(2, 3, 4, 8)
    here = policy.score_pages(rotated_keys(), values, POSITIONS)
    there = policy.score_pages(rotated_keys(shift=900), values, POSITIONS + 900)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


def test_heads_are_equals_however_large_their_logits_are():
    score = torch.tensor([[[0.0, 90.0], [1.0, 90.0], [0.5, 92.0]]])
    is_page = torch.ones(1, 3, dtype=torch.bool)
    stats = PageStats(is_page, torch.arange(3)[None], torch.tensor([[0, 0, 1]]), score=score)
    utility = ExpectedAttentionOptions().build(FITTED).utility(stats)
    right = [(1 / (1 + math.e) + 0.5) / 2, (math.e / (1 + math.e) + 0.5) / 2, 1.0]
    assert utility[0].tolist() == pytest.approx(right)


def test_the_scorer_learns_what_draws_attention():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 16_000, 16, generator=generator)  # as 64 windows give
    targets = torch.stack([inputs[0, :, 3] > 1, inputs[1, :, 12] < -1]).float() * 0.8 + 0.01
    scorer = train(inputs, targets)
    fresh = torch.randn(2, 500, 16, generator=generator)
    shares = scorer.predict(fresh).exp()
    for found, is_wanted in zip(shares, (fresh[0, :, 3] > 1.2, fresh[1, :, 12] < -1.2)):
        assert found[is_wanted].median() > 0.5 and found[~is_wanted].median() < 0.05


def test_quest_lets_go_of_what_falls_below_its_threshold():
    score = torch.tensor([[0.9, 0.02, 0.3]])
    is_page = torch.ones(1, 3, dtype=torch.bool)
    stats = PageStats(is_page, torch.arange(3)[None], torch.zeros(1, 3).long(),
                      score=score.unsqueeze(2))
    policy = QuestOptions(threshold=0.1).build(FITTED)
    assert policy.drop(stats, torch.tensor([[3]])).tolist() == [[False, True, False]]
    assert policy.drop(stats, torch.tensor([[1]])).tolist() == [[False, True, True]]


@pytest.mark.parametrize("name", ["expected_attention", "quest"])
def test_what_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"retention {name} needs a calibration: set calibration"):
        PiKVConfig(retention=name).resolve([SHAPE])
    with pytest.raises(ValueError, match=f"retention {name} needs the section .* latent"):
        type(PiKVConfig(retention=name).retention)().build({"keys.mean": torch.zeros(1)})
