"""Keys that later queries will look for stay (Expected Attention, arXiv 2510.00636).

Legend: np query heads, ng KV heads, g = np / ng, w width, c pages, S tokens a page, r sequences, m
columns.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pikv_megatron.calibrated import section
from pikv_megatron.ops.rotation import unrotated
from pikv_megatron.retention.base import RetentionOptions, RetentionPolicy, share_of_shard
from pikv_megatron.retention.fitted import Rotary


class ExpectedAttentionOptions(RetentionOptions):
    """Pages whose keys the calibrated distribution of queries will attend to most stay."""

    name: Literal["expected_attention"] = "expected_attention"
    horizon: int = Field(512, ge=1, description="tokens behind a key that queries are expected in")

    needs_calibration: ClassVar[bool] = True

    def build(self, fitted=None):
        asker = f"retention {self.name}"
        queries, rotary = (section(fitted, asker, part) for part in ("queries", "rotary"))
        return ExpectedAttentionPolicy(
            queries["mean"], queries["covariance"], Rotary(rotary), self.horizon
        )


class ExpectedAttentionPolicy(RetentionPolicy):
    """Queries before RoPE are taken as Gaussian, so E exp(q . k) = exp(mu . k + k S k / 2).

    The distribution is turned by the mean rotation over the distances that are expected, relative
    to the key, not to a prompt's end: so a page's score is known when it is sealed, is the same
    wherever and in however many pieces its prompt was fed, and holds for decoded tokens, too. It
    counts each token by the norm of its value; heads are equals, each with its softmax over the
    pages of a shard.

    Args:
        mean: [np, w], of queries before RoPE, times the softmax scale.
        covariance: [np, w, w], likewise.
        rotary: how keys are rotated.
        horizon: distances 1 to that are expected alike.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, rotary: Rotary, horizon: int):
        self._rotary = rotary
        self.num_scores = len(mean)
        turn = _mean_rotation(mean.shape[1], rotary, horizon, mean.device)
        self._mean = mean @ turn
        self._covariance = turn.T @ covariance @ turn

    def score_pages(self, keys, values, positions):
        ng, c, size, _ = keys.shape
        keys = self._rotary.turned_back(keys, positions).flatten(1, 2)
        mean = self._mean.unflatten(0, (ng, -1))  # [ng, g, w]
        covariance = self._covariance.unflatten(0, (ng, -1))
        logits = torch.einsum("ngw,ntw->ngt", mean, keys)
        logits += torch.einsum("ntw,ngwv,ntv->ngt", keys, covariance, keys) / 2
        logits += values.float().flatten(1, 2).norm(dim=2).clamp(min=1e-6).log().unsqueeze(1)
        by_page = logits.flatten(0, 1).unflatten(1, (c, size))
        return by_page.logsumexp(dim=2).T

    def utility(self, stats):
        return share_of_shard(stats, stats.score)


def _mean_rotation(width: int, rotary: Rotary, horizon: int, device: torch.device) -> Tensor:
    """[w, w], which multiplied from the right turns rows by the mean over distances."""
    eye = torch.eye(width, device=device).expand(horizon, -1, -1)
    distance = -torch.arange(1, horizon + 1, device=device)
    return unrotated(eye, distance, rotary.angles, rotary.is_interleaved).mean(dim=0)
