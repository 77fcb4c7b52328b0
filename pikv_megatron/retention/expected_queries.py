"""The calibrated distribution of queries, and what it will find in keys (Expected Attention, arXiv
2510.00636).

Legend: np query heads, ng KV heads, g = np / ng, w width, c pages, S tokens a page.
"""

from typing import Mapping

import torch
from torch import Tensor

from pikv_megatron.calibrated import section
from pikv_megatron.ops.rotation import unrotated
from pikv_megatron.retention.fitted import Rotary


class ExpectedQueries:
    """Queries before RoPE are taken as Gaussian, so E exp(q . k) = exp(mu . k + k S k / 2).

    The distribution is turned by the mean rotation over the distances that are expected, relative
    to the key, not to a prompt's end: so what is found is the same wherever and in however many
    pieces a prompt was fed.

    Args:
        mean: [np, w], of queries before RoPE, times the softmax scale.
        covariance: [np, w, w], likewise.
        rotary: how keys are rotated.
        horizon: distances 1 to that are expected alike.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, rotary: Rotary, horizon: int):
        self._rotary = rotary
        self.num_heads = len(mean)
        turn = _mean_rotation(mean.shape[1], rotary, horizon, mean.device)
        self._mean = mean @ turn
        self._covariance = turn.T @ covariance @ turn

    @classmethod
    def of(
        cls, fitted: Mapping[str, Tensor] | None, policy: str, horizon: int
    ) -> "ExpectedQueries":
        """Those of a layer's calibration, for a policy.

        Raises:
            ValueError: it has none.
        """
        asker = f"retention {policy}"
        queries, rotary = (section(fitted, asker, part) for part in ("queries", "rotary"))
        return cls(queries["mean"], queries["covariance"], Rotary(rotary), horizon)

    def logits(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """[ng, g, c, S], float32: the log of what each head is expected to give a token, which
        counts by the norm of its value.

        Args:
            keys: [ng, c, S, w], rotated.
            values: [ng, c, S, w_v].
            positions: [c, S].
        """
        ng, c, size, _ = keys.shape
        keys = self._rotary.turned_back(keys, positions).flatten(1, 2)
        mean = self._mean.unflatten(0, (ng, -1))  # [ng, g, w]
        covariance = self._covariance.unflatten(0, (ng, -1))
        logits = torch.einsum("ngw,ntw->ngt", mean, keys)
        logits += torch.einsum("ntw,ngwv,ntv->ngt", keys, covariance, keys) / 2
        logits += values.float().flatten(1, 2).norm(dim=2).clamp(min=1e-6).log().unsqueeze(1)
        return logits.unflatten(2, (c, size))


def _mean_rotation(width: int, rotary: Rotary, horizon: int, device: torch.device) -> Tensor:
    """[w, w], which multiplied from the right turns rows by the mean over distances."""
    eye = torch.eye(width, device=device).expand(horizon, -1, -1)
    distance = -torch.arange(1, horizon + 1, device=device)
    return unrotated(eye, distance, rotary.angles, rotary.is_interleaved).mean(dim=0)
