"""The MLP that says from a token's key and value how much attention it will have (paper, S_QUEST).

Legend: ng KV heads, w and w_v widths of keys and values, t tokens, n windows, k samples of each.
"""

import torch
from torch import Tensor

from pikv_megatron.ops.rotation import unrotated
from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.retention.scorer import features, train

SAMPLES = 256  # tokens of a window and KV head
# Later tokens have too few queries behind them to say.
JUDGED = 0.75


class ScorerFit(LayerFit):
    """Samples of every window, learned from when all are there.

    Half of them are tokens that had most attention, which are few and what it is about; the others
    are drawn.
    """

    def of(self, window):
        if window.angles is None or window.kv.values_in_keys:
            return {}
        place = window.place
        key = unrotated(window.key.float(), place, window.angles, window.is_interleaved)
        peak = window.far.peak[:, : int(JUDGED * len(place))]
        chosen = _chosen(peak, window.number)
        inputs = features(key, window.value).transpose(0, 1)  # [ng, t, w + w_v]
        index = chosen.unsqueeze(2).expand(-1, -1, inputs.shape[2])
        # 16 bits: they are many. A place for each window, so that sums are unions.
        inputs = inputs.gather(1, index).to(torch.float16)
        targets = peak.gather(1, chosen).to(torch.float16)
        return {
            name: x.new_zeros(self._num_windows, *x.shape).index_copy_(
                0, place.new_tensor([window.number]), x.unsqueeze(0)
            ) for name, x in (("inputs", inputs), ("targets", targets))
        }

    def finish(self, sums):
        inputs, targets = (sums[name].transpose(0, 1).flatten(1, 2) for name in sums)
        return {f"scorer.{name}": part for name, part in train(inputs, targets)._asdict().items()}


def _chosen(peak: Tensor, seed: int) -> Tensor:
    """[ng, k], tokens of peak [ng, t]."""
    count = min(SAMPLES // 2, peak.shape[1])
    best = peak.topk(count, dim=1).indices
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(peak.shape[1], generator=generator)[:count]
    return torch.cat([best, drawn.to(best.device).expand_as(best)], dim=1)
