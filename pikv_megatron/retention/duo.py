"""Heads that retrieve decide, over all layers together (paper, Table 3, S_Duo: u = sum over layers
of a^(l); DuoAttention, arXiv 2410.10819).

Legend: r sequences, m columns, ng KV heads, np query heads.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pikv_megatron.calibrated import section
from pikv_megatron.retention.base import ObservingOptions, RetentionPolicy


class DuoOptions(ObservingOptions):
    """Pages that retrieval heads attend to, all layers', stay; streaming layers keep none."""

    name: Literal["duo"] = "duo"
    threshold: float = Field(
        0.2, ge=0, le=1,
        description="share of the attention beyond the first tokens and 64 neighbours, of the "
        "queries that looked farthest in the calibration, from which a head retrieves",
    )

    needs_calibration: ClassVar[bool] = True

    def build(self, fitted=None):
        return DuoPolicy(section(fitted, f"retention {self.name}", "heads")["far"], self.threshold)


class DuoPolicy(RetentionPolicy):
    """Of streaming heads, what they see beyond first tokens and neighbours does not count.

    DuoAttention stores nothing else for them. Heads share their pages here, so a streaming head's
    part of a page can only go with the page: where every KV head of a layer streams, the layer's
    pages go, and are freed; where one retrieves, pages stay whole.

    Args:
        far: [np], share of the attention that lies far away, of each head's queries that look
            farthest.
        threshold: from which a head retrieves; its KV head does if any of its heads does.
    """

    sums_layers = True

    def __init__(self, far: Tensor, threshold: float):
        self._retrieves = far >= threshold
        self.keeps_none = not bool(self._retrieves.any())

    def utility(self, stats):
        retrieves = self._retrieves.unflatten(0, (stats.mass.shape[2], -1)).any(dim=1)
        mean = (stats.mass * retrieves).sum(dim=2) / stats.seen.clamp(min=1)
        return mean.masked_fill(stats.seen == 0, torch.inf)

    def drop(self, stats, limit):
        return stats.is_page if self.keeps_none else super().drop(stats, limit)
