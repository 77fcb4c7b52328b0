"""As many pages as it takes for the others to be known to matter little.

With page bounds l_p <= log Z_p <= u_p and the window's Z_w, all of whose tokens are read, the share
of the attention that is not read is at most

    U / (Z_w + L + U),    U = sum of exp(u_p) not read,    L = sum of exp(l_p) read,

since it grows with what is not read and falls with what is. Pages are taken in the order of their
upper bounds, and along that order the bound falls, so one pass over the sorted pages finds how many
it takes. Token buffers are read, too, and would only lower it.

No router goes with it. The bounds say which shards' pages are read, so all that a router could
spare are token buffers, and of these home knows no bound: it sketches a page when it is sealed.
Replicas do not either: home would count a token in each of its pages, and owners hide all but one
of them.

Legend: n sequences, np query heads, M columns of all ranks together.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from pikv_megatron.selector.base import PageSelector, SelectorOptions, ranked

ROUNDING = 1e-3  # of the tolerance: sums of thousands of pages in float32


class CertifiedOptions(SelectorOptions):
    """Pages in the order of their upper bounds, until no head can lose more than a share."""

    name: Literal["certified"] = "certified"
    tolerance: float = Field(
        0.02, ge=0, lt=1, description="share of a query's attention that is not read, in any head"
    )

    needs_sketch: ClassVar[bool] = True
    needs_bounds: ClassVar[bool] = True

    def build(self):
        return CertifiedSelector(self.tolerance)


class CertifiedSelector(PageSelector):
    """The bound holds whatever the keys are; how many pages it takes depends on the sketch."""

    needs_near = True
    certifies = True

    def __init__(self, tolerance: float):
        self._tolerance = tolerance * (1 - ROUNDING)

    def num_columns(self, most_pages):
        return most_pages

    def select(self, ask, may_read, most_pages):
        lower, upper = ask.page_bounds
        near = ask.near_lse.unsqueeze(2)
        # What there is at least of everything; an infinite share then is of a page that is read.
        floor = torch.cat([near, lower], dim=2).logsumexp(dim=2, keepdim=True)
        most, least = (upper - floor).exp(), (lower - floor).exp()
        columns, is_listed = ranked(most.amax(dim=1), may_read, most_pages)
        by_head = columns.unsqueeze(1).expand_as(most)
        most, least = most.gather(2, by_head), least.gather(2, by_head)
        # Of each place: all from it on, and all before it.
        left = most.flip(2).cumsum(dim=2).flip(2)
        read = (near - floor).exp() + least.cumsum(dim=2) - least
        is_enough = left * (1 - self._tolerance) <= self._tolerance * read
        is_wanted = is_listed & ~is_enough.all(dim=1)
        return torch.where(is_wanted, columns, -1)
