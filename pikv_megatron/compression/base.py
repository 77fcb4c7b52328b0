"""How sealed pages are written and read.

Legend: ng KV heads, c pages, S tokens a page, hn head width, n sequences.
"""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import AttentionState, KVPages, PageList


class KVCodec(ABC):
    """The format of sealed pages. Token buffers and stream windows stay as computed."""

    @abstractmethod
    def allocate(
        self, num_groups: int, num_pages: int, page_size: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> KVPages:
        """An empty pool of `num_pages` pages."""

    @abstractmethod
    def seal(
        self, keys: torch.Tensor, values: torch.Tensor, pages: KVPages, page: torch.Tensor
    ) -> None:
        """Write full pages [ng, c, S, hn] to the places `page` [c] of a pool."""

    @abstractmethod
    def restore(self, pages: KVPages, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [ng, c, S, hn] that stored pages stand for."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, sealed: PageList, plain: list[PageList], softmax_scale: float
    ) -> AttentionState:
        """Attention of query [n, sq, np, hn] over sealed pages and over lists as computed."""
