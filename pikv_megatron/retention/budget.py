"""How many pages of a sequence stay in a shard: a thing of its own, beside the policy.

Legend: r sequences, s shards.
"""

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from pydantic import ByteSize, Field, model_validator

from pikv_megatron.options import Options, family


class Budget(Options):
    """A limit on the pages that stay, as a configuration gives it.

    Across shards, what stays depends on the number of ranks: on which shards one has.
    """

    across_shards: bool = Field(
        False, description="whether the shards of a rank have their limits together, for the "
        "pages that are worth most in any of them"
    )

    @property
    def across(self) -> dict[str, Any]:
        """How far limits are had together, in the words of a configuration."""
        return {"across_shards": self.across_shards}

    @property
    def joins_layers(self) -> bool:
        """Whether layers have their limits together."""
        return False

    def for_layer(self, number: int, num_layers: int, num_paged: int) -> "Budget":
        """The budget of layer `number`, from 0, of `num_layers`, of which `num_paged` have pages.
        """
        return self

    @abstractmethod
    def in_store(self, page_bytes: int, num_sequences: int, num_shards: int) -> "PageBudget":
        """The same in pages, on a rank.

        Args:
            page_bytes: of a page of the layer, with all that is kept of it.
            num_sequences: that have pages on the rank at most.
            num_shards: of each sequence that the rank owns.

        Raises:
            ValueError: no page would stay.
        """


class PageBudget(Budget):
    """A limit on the pages of each sequence and shard."""

    across_layers: float = Field(
        1.0, ge=1, description="times its own limit that a layer may keep at most; above 1, layers "
        "have their limits together, for the pages that are worth most in any of them"
    )

    @property
    def across(self):
        return {**super().across, "across_layers": self.across_layers}

    @property
    def joins_layers(self):
        return self.across_layers > 1

    def in_store(self, page_bytes, num_sequences, num_shards):
        return self

    @abstractmethod
    def limit(self, num_sealed: torch.Tensor) -> torch.Tensor:
        """[r, s], int64: pages that stay of num_sealed [r, s], those ever sealed in each shard."""

    @abstractmethod
    def of_rank(self, num_pages: int, num_shards: int) -> int:
        """Pages that stay of a rank's, those of all sequences in their `num_shards` shards."""

    @abstractmethod
    def most(self, num_sealed: int, num_shards: int) -> int:
        """At least the pages that stay of `num_sealed`, however they lie in `num_shards`."""


class ShareBudget(PageBudget):
    """A share of the pages that a sequence ever filled, in every shard."""

    name: Literal["share"] = "share"
    keep: float = Field(
        0.25, gt=0, le=1, description="share of a shard's pages that stay, rounded up"
    )

    def at_share(self, share, num_shards):
        return type(self)(**self.model_dump() | {"keep": share})

    def limit(self, num_sealed):
        return (num_sealed * self.keep).ceil().long()

    def of_rank(self, num_pages, num_shards):
        return math.ceil(num_pages * self.keep)

    def most(self, num_sealed, num_shards):
        # Each shard rounds up.
        return min(num_sealed, math.ceil(num_sealed * self.keep) + num_shards - 1)


class PagesBudget(PageBudget):
    """A number of pages in each shard (the paper's K)."""

    name: Literal["pages"] = "pages"
    pages: int = Field(16, ge=1, description="pages of a sequence that stay, a shard")

    def limit(self, num_sealed):
        return num_sealed.clamp(max=self.pages)

    def of_rank(self, num_pages, num_shards):
        return min(num_pages, self.pages * num_shards)

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

    def for_layer(self, number, num_layers, num_paged):
        slope = 1 - 2 * number / (num_layers - 1) if num_layers > 1 else 0.0
        keep = self.keep * (1 + self.steepness * slope)
        return ShareBudget(keep=keep, **self.across)


class BytesBudget(Budget):
    """Bytes of a rank's pages, the same part of them for each layer, sequence slot and shard.

    What a sequence keeps does not depend on those beside it, and pages that stay never take more,
    whatever comes; pinned ones may. Every rank has its own bytes, so this depends on the number of
    ranks: over twice as many, as many sequences keep twice as much.
    """

    name: Literal["bytes"] = "bytes"
    bytes: ByteSize = Field(
        ByteSize(2**28), ge=1,
        description="that pages which stay take on a rank at most, all layers and sequence slots "
        "together, `2GiB` say; room for the pages of a prompt's chunk comes on top",
    )

    def for_layer(self, number, num_layers, num_paged):
        return self.model_copy(update={"bytes": ByteSize(self.bytes // max(1, num_paged))})

    def in_store(self, page_bytes, num_sequences, num_shards):
        least = num_sequences * num_shards * page_bytes
        if self.bytes < least:
            raise ValueError(
                f"budget.bytes leaves a layer {self.bytes.human_readable()}, and one page of "
                f"{page_bytes} bytes in each of {num_shards} shards of {num_sequences} sequences "
                f"takes {ByteSize(least).human_readable()}: raise it, or lower the number of "
                "sequences, token_shards or page_size"
            )
        return PagesBudget(pages=self.bytes // least, across_shards=self.across_shards)


RetentionBudget = family(ShareBudget, PagesBudget, PyramidBudget, BytesBudget)
