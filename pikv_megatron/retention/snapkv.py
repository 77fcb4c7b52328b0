"""What the end of the prompt looks at stays (SnapKV, arXiv 2404.14469)."""

from typing import Literal

import torch

from pikv_megatron.retention.base import ObservingOptions, RetentionPolicy


class SnapKVOptions(ObservingOptions):
    """Pages that the last queries of the latest prompt attend to stay; later pages do too."""

    name: Literal["snapkv"] = "snapkv"

    def build(self, fitted=None):
        return SnapKVPolicy()


class SnapKVPolicy(RetentionPolicy):
    """The observation window alone judges: what is decoded afterwards changes nothing.

    SnapKV pools scores over 7 neighbours, so that they stay together; a page is such a
    neighbourhood. It chooses by head; here heads share their pages, and the mean over them counts.
    """

    def utility(self, stats):
        return stats.observed.masked_fill(stats.observed < 0, torch.inf)
