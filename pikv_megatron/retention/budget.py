"""How many pages of a sequence stay on a rank: a thing of its own, beside the policy.

Legend: r sequences.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field

from pikv_megatron.options import Options, family


class Budget(Options):
    """A limit on the pages of each sequence."""

    @abstractmethod
    def limit(self, num_sealed: torch.Tensor, num_shards: int) -> torch.Tensor:
        """[r], int64: pages that stay of num_sealed [r], which a rank with `num_shards` shards
        has sealed for each sequence in all."""

    def most(self, num_sealed: int, num_shards: int) -> int:
        """`limit` for one number."""
        return int(self.limit(torch.tensor([num_sealed]), num_shards))


class ShareBudget(Budget):
    """A share of the pages that a sequence ever filled."""

    name: Literal["share"] = "share"
    keep: float = Field(0.25, gt=0, le=1, description="share of a sequence's pages that stay")

    def limit(self, num_sealed, num_shards):
        return (num_sealed * self.keep).ceil().long()


class PagesBudget(Budget):
    """A number of pages in each shard (the paper's K), which its rank's shards share."""

    name: Literal["pages"] = "pages"
    pages: int = Field(16, ge=1, description="pages of a sequence that stay, a shard")

    def limit(self, num_sealed, num_shards):
        return num_sealed.clamp(max=self.pages * num_shards)


RetentionBudget = family(ShareBudget, PagesBudget)
