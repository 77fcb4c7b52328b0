"""A share of the attention (as Twilight, arXiv 2502.02770, prunes to a top-p of the mass)."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.selector.base import PageSelector, SelectorOptions, ranked


class MassOptions(SelectorOptions):
    """Pages, the best first, until their estimated share of the attention to pages is reached."""

    name: Literal["mass"] = "mass"
    share: float = Field(0.8, gt=0, le=1, description="of the attention to a sequence's pages")

    needs_sketch: ClassVar[bool] = True

    def build(self):
        return MassSelector(self.share)


class MassSelector(PageSelector):
    """Sharp attention reads few pages and diffuse attention many: nobody has to say how many."""

    def __init__(self, share: float):
        # All of the attention is all pages, however their shares are rounded.
        self._share = share if share < 1 else math.inf

    def num_columns(self, most_pages):
        return most_pages

    def select(self, ask, may_read, most_pages):
        columns, is_listed = ranked(ask.page_scores, may_read, most_pages)
        shares = ask.page_scores.gather(1, columns)
        before = shares.cumsum(dim=1) - shares
        return torch.where(is_listed & (before < self._share), columns, -1)
