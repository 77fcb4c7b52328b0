"""What a home rank remembers of a page, so that relevance can be judged without asking its owner.

Legend: ng KV heads, c pages, n sequences, np query heads, m pages listed for a sequence, S tokens a
page, hn head width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from pikv_megatron.ops.make_sketch import make_sketch
from pikv_megatron.ops.score_pages import score_pages
from pikv_megatron.options import Options
from pikv_megatron.types import KVShape, PageSketch


class PageSketcher(ABC):
    """A kind of sketch, made when a page is sealed, from its keys as computed.

    Args:
        kv: the layer's keys.
        page_size: S.

    Attributes:
        learns: it has to be fitted.
    """

    learns = False

    def __init__(self, kv: KVShape, page_size: int):
        self.kv = kv
        self.page_size = page_size

    @abstractmethod
    def allocate(self, num_pages: int) -> PageSketch:
        """Room for the sketches of `num_pages` pages; every tensor is [ng, num_pages, ...]."""

    def fit(self, slot: int, keys: torch.Tensor) -> None:
        """Learn from the keys [ng, t, hn] of a sequence's first pages, before they are sketched."""

    def is_fitted(self, slot: int) -> bool:
        """Whether `fit` has nothing to do for a sequence."""
        return True

    def forget(self, slot: int) -> None:
        """The sequence ended."""

    def write(
        self, keys: torch.Tensor, sketch: PageSketch, page: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Sketch pages [ng, c, S, hn] of the sequences `slots` [c] into the places `page` [c]."""
        make_sketch(keys, sketch, page)

    def bounds(
        self, query: torch.Tensor, sketch: PageSketch, table: torch.Tensor, lens: torch.Tensor,
        slots: torch.Tensor, softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, np, m] twice: the log of a page's summed exponentials is at least and at most so
        much, up to float32's rounding; -inf where `lens` is 0. Only sketches that are built to
        bound have them."""
        raise NotImplementedError

    def logits(
        self, query: torch.Tensor, sketch: PageSketch, table: torch.Tensor, lens: torch.Tensor,
        slots: torch.Tensor, softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pages table [n, m] would give to query [n, np, hn].

        Returns:
            [n, np, m], estimate of the log of a page's summed exponentials, -inf where `lens` is 0;
            and [n, m], the mean over heads of their softmax over the listed pages.
        """
        scores = score_pages(query, sketch, table, lens, 0, softmax_scale, "mass")
        return scores.logit, scores.score

    def tensors(self) -> list[torch.Tensor]:
        """What is kept besides the sketches."""
        return []


class SketchOptions(Options):
    """Parameters of a sketch.

    Attributes:
        can_bound: it can tell what a page has at most and at least.
    """

    can_bound: ClassVar[bool] = False

    @abstractmethod
    def build(
        self, kv: KVShape, page_size: int, num_slots: int, bounds: bool = False
    ) -> PageSketcher | None:
        """The sketcher of a layer whose home rank has `num_slots` sequences; None: home remembers
        nothing of what is in a page.

        Args:
            bounds: it is to be asked for bounds.
        """
