"""Heavy hitters stay (H2O, arXiv 2306.14048; paper, Table 3, S_H2O: u = a)."""

from typing import Literal

import torch

from pikv_megatron.retention.base import ObservingOptions, RetentionPolicy


class H2OOptions(ObservingOptions):
    """Pages that had the most attention stay, judged by the prompt's last queries, then by all."""

    name: Literal["h2o"] = "h2o"

    def build(self, fitted=None):
        return H2OPolicy()


class H2OPolicy(RetentionPolicy):
    """Attention mass a query, so that old pages are not worth more for their age alone.

    H2O sums over all queries since a token came. Its recent tokens are kept besides; here they are
    the stream window, whose queries a page has not seen when it is sealed: until one has, it stays.
    """

    def utility(self, stats):
        mean = stats.mass.sum(dim=2) / stats.seen.clamp(min=1)
        return mean.masked_fill(stats.seen == 0, torch.inf)
