"""Moments of keys and values, and what errors in them cost: codecs are fitted to them.

Legend: ng KV heads, g query heads of each, w width, h hidden size.
"""

import torch
from torch import Tensor

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.codec.calibration import moment_tensors
from pikv_megatron.codec.transform.moments import KVMoments, Moments


class MomentsFit(LayerFit):
    """Sums in float64."""

    def of(self, window):
        key, value = (x.transpose(0, 1).double() for x in (window.key, window.value))
        query = window.query.double().unflatten(1, (len(key), -1)).transpose(0, 1).flatten(1, 2)
        return {
            "count": torch.tensor(key.shape[1], dtype=torch.float64, device=key.device),
            "queries": torch.tensor(query.shape[1], dtype=torch.float64, device=key.device),
            "key": key.sum(dim=1), "value": value.sum(dim=1),
            "keys": _second(key), "values": _second(value), "met": _second(query),
        }

    def finish(self, sums):
        count = sums["count"]
        keys = _moments(count, sums["key"], sums["keys"], sums["met"] / sums["queries"])
        values = _moments(count, sums["value"], sums["values"], self._output_metric())
        return moment_tensors(KVMoments(keys, values))

    def _output_metric(self) -> Tensor:
        """[ng, w, w], W_o W_o^T summed over the heads that read a KV head's values."""
        heads = self._attention.value_outputs().detach().double()  # [ng, g, w, h]
        return torch.einsum("ngwh,ngvh->nwv", heads, heads)


def _second(x: Tensor) -> Tensor:
    return torch.bmm(x.transpose(1, 2), x)


def _moments(count: Tensor, total: Tensor, second: Tensor, metric: Tensor) -> Moments:
    mean = total / count
    scatter = second - count * mean.unsqueeze(2) * mean.unsqueeze(1)
    return Moments(mean.float(), scatter.float(), int(count), metric.float())
