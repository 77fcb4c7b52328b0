"""The best pages, and a random sample of the others that stands for all of them (vAttention, arXiv
2510.05688, here over pages and shards).

Of r pages that are left, b are drawn without replacement. r / b times their sums of exponentials,
and of exponentials times values, estimate those of all r, and a factor on exponentials is a term on
logits: what is drawn is one more part of the attention, and merges by log-sum-exp. The denominator
errs by less than epsilon of the whole, with probability 1 - delta, if

    b >= r / (1 + (epsilon / (z sigma))^2 / r),    z = Phi^-1(1 - delta / 2),

where sigma is the standard deviation, over the pages left, of their shares of the whole. It is
taken from the sketches, and the limit is that of large samples: a promise as good as both, where
`certified` proves.

Legend: n sequences, np query heads, M columns of all ranks together.
"""

from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.selector.base import Sample, SelectorOptions
from pikv_megatron.selector.budget import BudgetSelector
from pikv_megatron.selector.lots import lots


class SampledOptions(SelectorOptions):
    """The best pages by their sketches, and a sample of the others that stands for all of them."""

    name: Literal["sampled"] = "sampled"
    tail: Literal["none"] = Field("none", description="nothing is left out")
    share: float = Field(0.0625, gt=0, le=1, description="of a sequence's pages: the best ones")
    epsilon: float = Field(
        0.05, gt=0, lt=1, description="error of the softmax's denominator, relative, in any head"
    )
    delta: float = Field(0.1, gt=0, lt=1, description="how often it may be larger")
    seed: int = Field(0, ge=0, lt=2**32, description="of the sample")

    needs_sketch: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    def build(self):
        return SampledSelector(self.share, self.epsilon, self.delta, self.seed)


class SampledSelector(BudgetSelector):
    """A page draws its lot by its tokens' positions, the query's and the layer's number, so the
    same pages are drawn on any number of ranks."""

    needs_near = True
    samples = True

    def __init__(self, share: float, epsilon: float, delta: float, seed: int):
        super().__init__(share, None)
        self._error = epsilon / NormalDist().inv_cdf(1 - delta / 2)
        self._seed = seed

    def num_drawn(self, most_pages):
        return most_pages

    def draw(self, ask, columns):
        is_left = ask.is_left(columns)
        num_left = is_left.sum(dim=1, keepdim=True)
        wanted = self._num_wanted(ask, is_left, num_left)
        seed = self._seed << 16 | ask.layer
        lot = lots(seed, ask.positions.unsqueeze(1), ask.newest)
        order = lot.masked_fill(~is_left, torch.iinfo(lot.dtype).max).argsort(dim=1, stable=True)
        place = torch.arange(order.shape[1], device=order.device)
        drawn = torch.where(place < wanted, order, -1)
        return Sample(drawn, (num_left / wanted.clamp(min=1)).clamp(min=1).log().squeeze(1))

    def _num_wanted(
        self, ask, is_left: torch.Tensor, num_left: torch.Tensor
    ) -> torch.Tensor:
        """[n, 1], pages to draw of those that are left: one at least, where there is one."""
        logits, near = ask.page_logits, ask.near_lse.unsqueeze(2)
        whole = torch.cat([near, logits], dim=2).logsumexp(dim=2, keepdim=True)
        is_one = is_left.unsqueeze(1)
        share = (logits - whole).exp().masked_fill(~is_one, 0.0)
        mean = share.sum(dim=2, keepdim=True) / num_left.unsqueeze(2).clamp(min=1)
        spread = (share - mean).square().masked_fill(~is_one, 0.0).sum(dim=2)  # r sigma^2, nearly
        spread = spread * num_left / (num_left - 1).clamp(min=1)
        wanted = (num_left / (1 + self._error**2 / spread)).amax(dim=1, keepdim=True).ceil().long()
        return torch.minimum(wanted.clamp(min=1), num_left)
