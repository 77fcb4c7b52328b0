"""How many pages of a sequence stay in a shard: a thing of its own, beside the policy.

Legend: r sequences, s shards.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field, model_validator

from pikv_megatron.options import Options, family


class Budget(Options):
    """A limit on the pages of each sequence and shard."""

    def for_layer(self, number: int, num_layers: int) -> "Budget":
        """The budget of layer `number`, from 0."""
        return self

    @abstractmethod
    def limit(self, num_sealed: torch.Tensor) -> torch.Tensor:
        """[r, s], int64: pages that stay of num_sealed [r, s], those ever sealed in each shard."""

    @abstractmethod
    def most(self, num_sealed: int, num_shards: int) -> int:
        """At least the pages that stay of `num_sealed`, however they lie in `num_shards`."""


class ShareBudget(Budget):
    """A share of the pages that a sequence ever filled, in every shard."""

    name: Literal["share"] = "share"
    keep: float = Field(
        0.25, gt=0, le=1, description="share of a shard's pages that stay, rounded up"
    )

    def limit(self, num_sealed):
        return (num_sealed * self.keep).ceil().long()

    def most(self, num_sealed, num_shards):
        # Each shard rounds up.
        return min(num_sealed, math.ceil(num_sealed * self.keep) + num_shards - 1)


class PagesBudget(Budget):
    """A number of pages in each shard (the paper's K)."""

    name: Literal["pages"] = "pages"
    pages: int = Field(16, ge=1, description="pages of a sequence that stay, a shard")

    def limit(self, num_sealed):
        return num_sealed.clamp(max=self.pages)

    def most(self, num_sealed, num_shards):
        return min(num_sealed, self.pages * num_shards)


class PyramidBudget(ShareBudget):
    """A share that falls from layer to layer as attention narrows (PyramidKV, 2406.02069)."""

    name: Literal["pyramid"] = "pyramid"
    keep: float = Field(0.25, gt=0, le=1, description="mean share of a shard's pages over layers")
    steepness: float = Field(
        0.5, ge=0, lt=1,
        description="the first layer keeps this part of the mean more, the last this part less",
    )

    @model_validator(mode="after")
    def _check(self) -> "PyramidBudget":
        if self.keep * (1 + self.steepness) > 1:
            raise ValueError(
                f"budget.keep {self.keep} and budget.steepness {self.steepness} give the first "
                f"layer {self.keep * (1 + self.steepness):g} of its pages: lower either"
            )
        return self

    def for_layer(self, number, num_layers):
        slope = 1 - 2 * number / (num_layers - 1) if num_layers > 1 else 0.0
        return ShareBudget(keep=self.keep * (1 + self.steepness * slope))


RetentionBudget = family(ShareBudget, PagesBudget, PyramidBudget)
