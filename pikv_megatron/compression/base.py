"""How sealed pages are written and read.

Legend: ng KV heads, c pages, S tokens a page, hn head width, n sequences, m pages a sequence.
"""

from abc import ABC, abstractmethod

import torch

from pikv_megatron.types import AttentionState


class KVCodec(ABC):
    """The format of sealed pages. Token buffers and stream windows stay as computed."""

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn full pages [ng, c, S, hn] into what is stored of them."""

    @abstractmethod
    def decode(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages [ng, c, S, hn] that stored ones stand for: the reference for `attend`."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        page_table: torch.Tensor, token_mask: torch.Tensor, softmax_scale: float,
    ) -> AttentionState:
        """Attend to stored pages; arguments as those of `decode_attention`."""
