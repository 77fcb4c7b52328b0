"""Which heads retrieve and which stream (DuoAttention, arXiv 2410.10819).

DuoAttention learns a gate a head by how much the output changes where a head sees the first tokens
and its neighbours only, where something is to be found. Here it is measured: the share of its
attention that lies beyond them, of the queries that look there most.
"""

import torch

from pikv_megatron.calibration.fits.base import LayerFit


class HeadsFit(LayerFit):
    """[np], mean over windows."""

    def of(self, window):
        return {"far": window.far.share.double() / self._num_windows}

    def finish(self, sums):
        return {"heads.far": sums["far"].to(torch.float32)}
