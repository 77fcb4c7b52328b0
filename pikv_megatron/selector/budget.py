"""A number of pages, or a share of them (Quest, arXiv 2406.10774, and Loki, 2406.02542, do so)."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from pikv_megatron.selector.base import PageSelector, SelectorOptions, ranked


class BudgetOptions(SelectorOptions):
    """The best pages by their sketches: a number of them, or a share."""

    name: Literal["budget"] = "budget"
    share: float | None = Field(
        None, gt=0, le=1, description="of a sequence's pages; null: 1/8, or as `pages` says"
    )
    pages: int | None = Field(None, ge=1, description="number of pages; null: as `share` says")

    needs_sketch: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> "BudgetOptions":
        if self.share is not None and self.pages is not None:
            raise ValueError("selector.share and selector.pages exclude each other: keep one")
        return self

    def at_share(self, share, num_shards):
        return self.model_copy(update={"share": share, "pages": None})

    def build(self):
        share = 0.125 if self.share is None and self.pages is None else self.share
        return BudgetSelector(share, self.pages)


class BudgetSelector(PageSelector):
    """One choice over all ranks for each sequence."""

    def __init__(self, share: float | None, pages: int | None):
        self._share, self._pages = share, pages

    def num_columns(self, most_pages):
        if self._pages is not None:
            return min(self._pages, most_pages)
        return math.ceil(self._share * most_pages)

    def select(self, ask, may_read, most_pages):
        columns, is_listed = ranked(ask.page_scores, may_read, self.num_columns(most_pages))
        if self._pages is not None:
            return torch.where(is_listed, columns, -1)
        # Of x pages, those before x * share: their number is rounded up.
        wanted = ask.is_page.sum(dim=1, keepdim=True) * self._share
        order = torch.arange(columns.shape[1], device=columns.device)
        return columns.masked_fill(~(is_listed & (order < wanted)), -1)
