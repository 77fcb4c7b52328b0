"""How queries are distributed before RoPE: Expected Attention scores keys against them.

Legend: t tokens, np query heads, w width.
"""

import torch

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.calibration.window import SINKS
from pikv_megatron.ops.rotation import unrotated


class QueriesFit(LayerFit):
    """Mean and covariance by head (2510.00636, section 3), the first tokens' queries left out; of
    queries times the softmax scale, so that products with keys are logits."""

    def of(self, window):
        if window.angles is None:
            return {}
        place = window.place
        query = unrotated(window.query.double(), place, window.angles, window.is_interleaved)
        query = query[SINKS:].transpose(0, 1) * window.softmax_scale
        return {
            "count": torch.tensor(query.shape[1], dtype=torch.float64, device=query.device),
            "sum": query.sum(dim=1), "second": torch.bmm(query.transpose(1, 2), query),
            # The same in every window.
            "angles": window.angles.double() / self._num_windows,
            "interleaved": torch.tensor(
                float(window.is_interleaved) / self._num_windows, dtype=torch.float64,
                device=query.device,
            ),
        }

    def finish(self, sums):
        mean = sums["sum"] / sums["count"]
        covariance = sums["second"] / sums["count"] - mean.unsqueeze(2) * mean.unsqueeze(1)
        return {
            "queries.mean": mean.float(), "queries.covariance": covariance.float(),
            "rotary.angles": sums["angles"].float(),
            "rotary.interleaved": sums["interleaved"].round().long(),
        }
